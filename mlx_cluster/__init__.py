"""One language model served by several machines with MLX."""

import os

# gRPC reads these when it is first imported, so they stand before any import of it. It would print a line about fork
# handlers for every child process and one for every peer that leaves; and its handlers have no work here, because no
# child of this project uses gRPC before it has executed a program of its own.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"
