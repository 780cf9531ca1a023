"""One language model served by several machines with MLX."""

__version__ = "0.1.0"
