"""Text to token ids and back, at the edge of the cluster: inside it there are only ids.

Owns: the chat template, encoding, decoding token by token, stop strings.
Does not own: HTTP, sampling. It computes nothing with mlx.
Invariant: importing this package is cheap; transformers (about a second) is imported by ``load``.
"""

from mlx_cluster.tokenizer.decode import IncrementalDecoder
from mlx_cluster.tokenizer.stops import StopMatcher
from mlx_cluster.tokenizer.tokenizer import Tokenizer, load

__all__ = ["IncrementalDecoder", "StopMatcher", "Tokenizer", "load"]
