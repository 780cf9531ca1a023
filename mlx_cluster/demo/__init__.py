"""The built-in demo model: a small, real, trained language model that ships with the package.

Owns where the model lies. It imports nothing heavy, so that asking for the path costs nothing; training it is
`mlx_cluster.demo.train`. Invariant: `model_dir()` is a complete mlx-lm model directory.
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "demo"


def model_dir() -> Path:
    """The directory of the built-in model: config, weights, tokenizer and chat template, readable by mlx-lm."""
    return Path(__file__).resolve().parent / "model"
