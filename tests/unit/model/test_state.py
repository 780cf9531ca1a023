"""Hidden states as frames: every dtype, several arrays, every kind of payload."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_cluster.errors import LinkMismatch, UnsupportedModel
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.model import state

DTYPES = ["bfloat16", "float16", "float32", "int32", "uint8", "bool"]


def array_of(dtype: str) -> mx.array:
    kind = mx.bool_ if dtype == "bool" else getattr(mx, dtype)
    return (100 * mx.random.normal((2, 3, 5), key=mx.random.key(1))).astype(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carrier", ["array", "bytes", "memoryview", "bytearray"])
def test_what_is_packed_comes_out_again(dtype: str, carrier: str) -> None:
    arrays = [array_of(dtype), array_of("float32")[:, 1:2], mx.arange(3)]
    frame = state.pack(7, arrays)
    payload = frame.payload
    match carrier:
        case "bytes":
            payload = bytes(memoryview(frame.payload))
        case "bytearray":
            payload = bytearray(memoryview(frame.payload))
        case "memoryview":
            payload = memoryview(bytes(memoryview(frame.payload)))
    assert memoryview(payload).nbytes == sum(state.num_bytes(spec) for spec in frame.tensors)
    out = state.unpack(Frame(7, frame.tensors, payload))
    for mine, theirs in zip(out, arrays, strict=True):
        assert mine.dtype == theirs.dtype
        assert mx.array_equal(mine, theirs)


def test_the_payload_is_one_dimension_of_bytes() -> None:
    view = memoryview(state.pack(1, [mx.ones((2, 4, 8), mx.bfloat16)]).payload)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, 128)


def test_zero_frames_have_the_promised_shape() -> None:
    frame = state.zero_frame(3, [TensorSpec("bfloat16", (2, 1, 8)), TensorSpec("int32", (2,))])
    hidden, extra = state.unpack(frame)
    assert hidden.shape == (2, 1, 8)
    assert extra.tolist() == [0, 0]
    assert not mx.any(hidden)


def test_a_payload_that_does_not_fit_its_description_is_refused() -> None:
    with pytest.raises(LinkMismatch, match="has 7 bytes, its description promises 8"):
        state.unpack(Frame(1, (TensorSpec("float32", (2,)),), b"1234567"))
    with pytest.raises(LinkMismatch, match="dtype 'float3'"):
        state.unpack(Frame(1, (TensorSpec("float3", (2,)),), b"12345678"))


def test_trees_of_arrays_and_none_are_taken_apart_and_rebuilt() -> None:
    a, b = mx.zeros((1,)), mx.ones((2,))
    tree = (a, [None, {"k": b}], None)
    leaves, skeleton = state.flatten(tree)
    assert [leaf.shape for leaf in leaves] == [(1,), (2,)]
    rebuilt = state.unflatten(skeleton, leaves)
    assert rebuilt[0] is a
    assert rebuilt[1][1]["k"] is b
    assert rebuilt[2] is None


def test_anything_else_in_a_tree_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="a str, which cannot cross"):
        state.flatten((mx.zeros((1,)), "x"))
