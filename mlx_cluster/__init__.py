"""One language model served by several machines with MLX."""

import os

# gRPC reads these when it is first imported, so they stand before any import of it. It would print a line about fork
# handlers for every child process and one for every peer that leaves; and its handlers have no work here, because no
# child of this project uses gRPC before it has executed a program of its own.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# gRPC's event engine hands every read and write to another thread. Without it a round trip of one hidden state between
# two processes takes 105 µs instead of 210 (grpcio 1.85, Linux, 2 cores; benchmarks/hop.py).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

__version__ = "0.1.0"
