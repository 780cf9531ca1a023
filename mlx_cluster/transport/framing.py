"""Frame ⇄ bytes: a small binary prefix, then the payload as it is.

Owns: the layout of one message on a hidden-state stream, and how many bytes a tensor spec stands for.
Does not own: streams, or what the tensors mean.
Invariant: ``decode(encode(frame))`` equals the frame; a message of the wrong length or version raises ``LinkMismatch``.

A frame without payload whose tensors are not empty is a *note*: its bytes travel another way (see ``mlx_link``).
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import lru_cache
from math import prod

from typing_extensions import Buffer

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.microbatch import Frame, TensorSpec

VERSION = 1
DTYPE_BYTES = {
    "bool_": 1, "uint8": 1, "int8": 1,
    "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4,
    "uint64": 8, "int64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip

# version, number of tensors, length of the prefix, unused, microbatch id, length of the payload
_HEAD = struct.Struct("<BBHIQQ")
_TENSOR = struct.Struct("<BB")  # length of the dtype's name, number of dimensions
_ALIGNMENT = 16  # so that the payload can be read in place by vector instructions


# The compressed form of a tensor (``transport.compression``): its values as int8, then a float16 for each block.
INT8 = "int8"
BLOCK_VALUES = 64


@lru_cache(1024)
def num_bytes(tensors: tuple[TensorSpec, ...]) -> int:
    """How many payload bytes these tensors take. Raises ``LinkMismatch`` for a dtype that mlx does not have."""
    return sum(map(tensor_bytes, tensors))


def tensor_bytes(spec: TensorSpec) -> int:
    """The same for one of them."""
    if spec.dtype not in DTYPE_BYTES:
        raise LinkMismatch(f"a hidden state of dtype {spec.dtype!r}: use one of {', '.join(DTYPE_BYTES)}")
    values = prod(spec.shape)
    if not spec.encoding:
        return DTYPE_BYTES[spec.dtype] * values
    if spec.encoding != INT8:
        raise LinkMismatch(f"a hidden state in form {spec.encoding!r}: the nodes run different versions")
    return values + DTYPE_BYTES["float16"] * -(-values // BLOCK_VALUES)


@lru_cache(1024)
def plain_bytes(tensors: tuple[TensorSpec, ...]) -> int:
    """How many they would take uncompressed."""
    return num_bytes(tuple(replace(spec, encoding="") for spec in tensors))


def flat(payload: Buffer) -> memoryview:
    """The payload as one-dimensional bytes, not copied."""
    view = memoryview(payload)
    if view.nbytes == 0:
        return memoryview(b"")  # an empty view of several dimensions cannot be cast
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def encode(frame: Frame) -> bytes:
    """One message. Copies the payload once: a gRPC message must be one ``bytes`` object."""
    payload = flat(frame.payload)
    expected = num_bytes(frame.tensors)
    if payload.nbytes not in (0, expected):
        raise LinkMismatch(
            f"microbatch {frame.microbatch_id}: the tensors {_names(frame.tensors)} take {expected} bytes, "
            f"the payload has {payload.nbytes}"
        )
    prefix_bytes, described = _describe(frame.tensors)
    head = _HEAD.pack(VERSION, len(frame.tensors), prefix_bytes, 0, frame.microbatch_id, payload.nbytes)
    return b"".join((head, described, payload))


def decode(message: bytes) -> Frame:
    """Inverse of ``encode``; the payload is a view into ``message``."""
    if len(message) < _HEAD.size:
        raise LinkMismatch(f"a hidden-state message of {len(message)} bytes is too short")
    version, num_tensors, prefix_bytes, _, microbatch_id, payload_bytes = _HEAD.unpack_from(message)
    if version != VERSION:
        raise LinkMismatch(f"the peer frames hidden states in version {version}, this stage in version {VERSION}")
    if len(message) != prefix_bytes + payload_bytes:
        raise LinkMismatch(
            f"microbatch {microbatch_id}: {len(message)} bytes came instead of {prefix_bytes + payload_bytes}"
        )
    try:
        tensors = _tensors_from(message[_HEAD.size : prefix_bytes], num_tensors)
    except (struct.error, UnicodeDecodeError) as error:
        raise LinkMismatch(f"microbatch {microbatch_id}: the prefix cannot be read ({error})") from error
    if payload_bytes not in (0, num_bytes(tensors)):
        raise LinkMismatch(
            f"microbatch {microbatch_id}: the tensors {_names(tensors)} take {num_bytes(tensors)} bytes, "
            f"the payload has {payload_bytes}"
        )
    return Frame(microbatch_id, tensors, memoryview(message)[prefix_bytes:])


# A pipeline sees few shapes, over and over: both directions of the description are remembered.
@lru_cache(1024)
def _describe(tensors: tuple[TensorSpec, ...]) -> tuple[int, bytes]:
    """Length of the whole prefix, and what stands in it after the head."""
    described = b"".join(_describe_one(spec) for spec in tensors)
    length = _HEAD.size + len(described)
    padding = -length % _ALIGNMENT
    return length + padding, described + bytes(padding)


def _describe_one(spec: TensorSpec) -> bytes:
    """The form of a compressed tensor stands behind its dtype: ``bfloat16+int8``."""
    name = (f"{spec.dtype}+{spec.encoding}" if spec.encoding else spec.dtype).encode("ascii")
    return struct.pack(f"<BB{len(name)}s{len(spec.shape)}Q", len(name), len(spec.shape), name, *spec.shape)


@lru_cache(1024)
def _tensors_from(described: bytes, num_tensors: int) -> tuple[TensorSpec, ...]:
    tensors: list[TensorSpec] = []
    offset = 0
    for _ in range(num_tensors):
        name_bytes, num_dims = _TENSOR.unpack_from(described, offset)
        layout = struct.Struct(f"<{name_bytes}s{num_dims}Q")
        name, *shape = layout.unpack_from(described, offset + _TENSOR.size)
        dtype, _, encoding = name.decode("ascii").partition("+")
        tensors.append(TensorSpec(dtype, tuple(shape), encoding))
        offset += _TENSOR.size + layout.size
    return tuple(tensors)


def _names(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.dtype}{list(spec.shape)}" for spec in tensors) or "(none)"
