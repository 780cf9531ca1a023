"""How fast this machine reads weights: what a decode step mostly does.

Owns: a measurement of less than a second. Does not own: what is made of it (placement). Run it in a process of its own,
``python -m mlx_cluster.model.speed``, which prints bytes per second: an agent never computes with mlx.
"""

from __future__ import annotations

import argparse
import time

import mlx.core as mx

from mlx_cluster.model.load import select_device

MATRIX_BYTES = 64 * 1024 * 1024  # beyond every cache that matters
MEASURE_SECONDS = 0.5


def read_bytes_per_second(seconds: float = MEASURE_SECONDS) -> float:
    """The best rate of products of a vector and a matrix, repeated for about ``seconds``."""
    dtype = mx.float16 if mx.default_device() == mx.Device(mx.gpu) else mx.float32
    width = 4096
    matrix = mx.ones((MATRIX_BYTES // (width * dtype.size), width), dtype=dtype)
    vector = mx.ones((width,), dtype=dtype)
    mx.eval(matrix, vector, matrix @ vector)  # the first one pays for allocation and kernels
    best, ends = 0.0, time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        mx.eval(matrix @ vector)
        now = time.perf_counter()
        best = max(best, MATRIX_BYTES / (now - began))
        if now >= ends:
            return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    select_device(parser.parse_args().device)
    print(f"{read_bytes_per_second():.0f}", flush=True)
