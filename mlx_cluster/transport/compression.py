"""Hidden states in eight bits, for slow links: block-wise, with one scale for each block.

Owns: the codec between a frame and its compressed form. The tensors of a compressed frame say so themselves
(``TensorSpec.encoding``), so a receiver needs no setting and frames of both forms may follow each other.
Does not own: which links compress (settings), or where in a stage it happens (``stage.compression``).
Invariant: a frame that is not compressed passes unchanged, as the very same object; shapes and dtypes are those that
were sent; a value is off by half a step of its block at most, which is 1/254 of the block's largest value.

A tensor's bytes are its values as int8, in order, and behind them a float16 scale for each block of 64. A block with a
value that is no number comes back as no numbers: a broken row must not look healthy.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.transport import framing

_LARGEST = 127
_FLOATING: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def compress(frame: Frame) -> Frame:
    """Every floating tensor of the frame in eight bits; others stay as they are. Any thread may call it."""
    data = memoryview(frame.payload).cast("B")
    specs: list[TensorSpec] = []
    parts: list[Any] = []
    at = 0
    for spec in frame.tensors:
        dtype = _FLOATING.get(spec.dtype)
        size = framing.tensor_bytes(spec)
        piece, at = data[at : at + size], at + size
        if dtype is None or not size:
            specs.append(spec)
            parts.append(piece)
        else:
            specs.append(replace(spec, encoding=framing.INT8))
            parts += _quantized(_as_float32(np.frombuffer(piece, dtype), spec.dtype))
    if at != data.nbytes:
        raise LinkMismatch(f"microbatch {frame.microbatch_id}: {data.nbytes} bytes for tensors of {at}")
    return Frame(frame.microbatch_id, tuple(specs), b"".join(parts))


def expand(frame: Frame) -> Frame:
    """Inverse of ``compress``, as far as eight bits can tell. Raises ``LinkMismatch`` for a form that is not known."""
    if not any(spec.encoding for spec in frame.tensors):
        return frame
    payload: Any = frame.payload
    data = memoryview(payload).cast("B")
    parts: list[Any] = []
    at = 0
    for spec in frame.tensors:
        size = framing.tensor_bytes(spec)
        piece, at = data[at : at + size], at + size
        if not spec.encoding:
            parts.append(piece)
        elif spec.dtype in _FLOATING:
            parts.append(_from_float32(_dequantized(piece, prod(spec.shape)), spec.dtype))
        else:
            raise LinkMismatch(f"a compressed tensor of dtype {spec.dtype}: the nodes run different versions")
    if at != data.nbytes:
        raise LinkMismatch(f"microbatch {frame.microbatch_id}: {data.nbytes} bytes for tensors of {at}")
    return Frame(frame.microbatch_id, tuple(replace(spec, encoding="") for spec in frame.tensors), b"".join(parts))


def _quantized(values: NDArray[np.float32]) -> list[bytes]:
    """The int8 values and the float16 scales."""
    padded = np.pad(values, (0, -len(values) % framing.BLOCK_VALUES)) if len(values) % framing.BLOCK_VALUES else values
    blocks = padded.reshape(-1, framing.BLOCK_VALUES)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = (largest / _LARGEST).astype("<f2")
    scales[~np.isfinite(scales)] = np.nan
    steps = scales.astype(np.float32)[:, None]
    usable = np.isfinite(steps) & (steps > 0)
    whole = np.divide(blocks, steps, out=np.zeros_like(blocks), where=np.broadcast_to(usable, blocks.shape))
    # A scale is rounded to float16, so the largest value may come out a little above 127 steps.
    np.clip(np.rint(whole, out=whole), -_LARGEST, _LARGEST, out=whole)
    return [whole.astype(np.int8).tobytes()[: len(values)], scales.tobytes()]


def _dequantized(data: memoryview, count: int) -> NDArray[np.float32]:
    whole = np.frombuffer(data, np.int8, count).astype(np.float32)
    scales = np.frombuffer(data, "<f2", offset=count).astype(np.float32)
    if count % framing.BLOCK_VALUES:
        return whole * np.repeat(scales, framing.BLOCK_VALUES)[:count]
    return (whole.reshape(-1, framing.BLOCK_VALUES) * scales[:, None]).reshape(-1)


def _as_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _from_float32(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return bytes(values.astype(_FLOATING[dtype]).tobytes())
    bits = values.view(np.uint32)
    # To the nearest, ties to even; what is no number keeps a bit that says so.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2").tobytes()
