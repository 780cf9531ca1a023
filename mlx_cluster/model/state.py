"""Hidden states: what crosses from one slice to the next, as arrays, as a skeleton, and as the bytes of a frame.

Owns: taking the arrays out of whatever a layer returns (an array, or tuples with arrays and None), and packing them
into a ``microbatch.Frame``.
Does not own: which of the arrays must cross (``model.graph``).
Invariant: ``unpack(pack(arrays)) == arrays`` bit for bit, for every dtype; a frame describes itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cluster.errors import LinkMismatch, UnsupportedModel
from mlx_cluster.microbatch import Frame, TensorSpec

# numpy has no bfloat16, so its bits travel as another type of the same width
_NUMPY_OF = {
    "bfloat16": np.uint16,
    "float16": np.float16,
    "float32": np.float32,
    "int32": np.int32,
    "int64": np.int64,
    "uint32": np.uint32,
    "uint8": np.uint8,
    "bool": np.uint8,
}


def flatten(tree: Any) -> tuple[list[mx.array], Any]:
    """Arrays of a layer's return value, in order, and the skeleton that ``unflatten`` fills again.

    Raises ``UnsupportedModel`` for anything but arrays and None inside tuples, lists and dictionaries.
    """
    leaves: list[mx.array] = []

    def visit(node: Any) -> Any:
        if node is None:
            return None
        if isinstance(node, mx.array):
            leaves.append(node)
            return len(leaves) - 1
        if isinstance(node, tuple | list):
            return type(node)(visit(child) for child in node)
        if isinstance(node, dict):
            return {key: visit(child) for key, child in node.items()}
        raise UnsupportedModel(f"a layer returns a {type(node).__name__}, which cannot cross to another machine")

    skeleton = visit(tree)
    return leaves, skeleton


def unflatten(skeleton: Any, leaves: Sequence[mx.array]) -> Any:
    """Inverse of ``flatten``."""
    if skeleton is None:
        return None
    if isinstance(skeleton, int):
        return leaves[skeleton]
    if isinstance(skeleton, dict):
        return {key: unflatten(child, leaves) for key, child in skeleton.items()}
    return type(skeleton)(unflatten(child, leaves) for child in skeleton)


def spec_of(array: mx.array) -> TensorSpec:
    return TensorSpec(str(array.dtype).removeprefix("mlx.core."), tuple(array.shape))


def num_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * int(_dtype(spec).size)


def as_bytes(arrays: Sequence[mx.array]) -> mx.array:
    """One flat uint8 array in the graph. Evaluate it with ``async_eval``: other threads may then read its buffer.

    The view must be part of the graph, because only the thread that owns mlx may add to it.
    """
    # reshape makes rows contiguous; view needs at least one dimension, which a scalar state would lack
    flat = [array.reshape(-1).view(mx.uint8) for array in arrays]
    return flat[0] if len(flat) == 1 else mx.concatenate(flat)


def pack(microbatch_id: int, arrays: Sequence[mx.array]) -> Frame:
    """A frame whose payload is a lazy array with the buffer protocol."""
    return Frame(microbatch_id, tuple(spec_of(array) for array in arrays), as_bytes(arrays))  # type: ignore[arg-type]


def zero_frame(microbatch_id: int, specs: Sequence[TensorSpec]) -> Frame:
    """The promised shape, without a value and without mlx."""
    return Frame(microbatch_id, tuple(specs), bytes(sum(num_bytes(spec) for spec in specs)))


def unpack(frame: Frame) -> list[mx.array]:
    """The arrays of a frame. Raises ``LinkMismatch`` when payload and description disagree."""
    sizes = [num_bytes(spec) for spec in frame.tensors]
    payload: Any = frame.payload
    have = payload.nbytes if isinstance(payload, mx.array) else memoryview(payload).nbytes
    if have != sum(sizes):
        raise LinkMismatch(f"frame {frame.microbatch_id} has {have} bytes, its description promises {sum(sizes)}")
    arrays: list[mx.array] = []
    offset = 0
    for spec, size in zip(frame.tensors, sizes, strict=True):
        arrays.append(_take(payload, offset, size, spec))
        offset += size
    return arrays


def array_from(spec: TensorSpec, data: Any) -> mx.array:
    """An array of its bytes."""
    return _take(data, 0, num_bytes(spec), spec)


def _take(payload: Any, offset: int, size: int, spec: TensorSpec) -> mx.array:
    if isinstance(payload, mx.array):
        return payload[offset : offset + size].view(_dtype(spec)).reshape(spec.shape)
    flat = np.frombuffer(payload, dtype=np.uint8, count=size, offset=offset).view(_NUMPY_OF[spec.dtype])
    array = mx.array(flat)
    return (array if array.dtype == _dtype(spec) else array.view(_dtype(spec))).reshape(spec.shape)


def _dtype(spec: TensorSpec) -> Any:
    if spec.dtype not in _NUMPY_OF:
        raise LinkMismatch(f"a frame names dtype {spec.dtype!r}: the nodes run different versions")
    return getattr(mx, "bool_" if spec.dtype == "bool" else spec.dtype)
