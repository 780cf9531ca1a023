"""Hidden states in eight bits: how near they come back, how many bytes they take, and what is not touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.microbatch import Frame, Microbatch, Outcome, Pending, TensorSpec
from mlx_cluster.stage.compression import CompressingRunner
from mlx_cluster.transport import compression, framing


def bits_of(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def values_of(payload: object, dtype: str) -> NDArray[np.float32]:
    data = bytes(payload)  # type: ignore[call-overload]
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float32)


def frame_of(values: NDArray[np.float32], dtype: str = "float32", shape: tuple[int, ...] | None = None) -> Frame:
    return Frame(7, (TensorSpec(dtype, shape or (len(values),)),), bits_of(values, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3, 128), (1, 1, 100), (1, 5), (63,), (1, 1, 64)])
def test_values_come_back_near_and_shapes_exactly(dtype: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    values[::37] *= 40  # outliers, as models have them
    frame = frame_of(values, dtype, shape)
    sent = compression.compress(frame)
    assert sent.tensors == (TensorSpec(dtype, shape, "int8"),)
    blocks = -(-count // 64)
    assert framing.num_bytes(sent.tensors) == memoryview(sent.payload).nbytes == count + 2 * blocks
    back = compression.expand(framing.decode(framing.encode(sent)))
    assert (back.microbatch_id, back.tensors) == (7, frame.tensors)
    largest = [np.abs(values[64 * b : 64 * b + 64]).max() for b in range(blocks)]
    allowed = np.repeat(largest, 64)[:count] * (0.5 / 127 * 1.01) + np.abs(values) * (
        2**-7 if dtype != "float32" else 0
    )
    got = values_of(back.payload, dtype)
    assert (np.abs(got - values) <= allowed + 1e-7).all()


def test_a_second_time_changes_nothing() -> None:
    """Compressed hidden states that a stage only passes on lose nothing more."""
    values = np.random.default_rng(1).normal(size=256).astype(np.float32)
    once = compression.expand(compression.compress(frame_of(values)))
    twice = compression.expand(compression.compress(once))
    assert np.allclose(values_of(once.payload, "float32"), values_of(twice.payload, "float32"), rtol=1e-3, atol=0)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=200),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_any_values_survive_the_way(values: list[float], dtype: str) -> None:
    array = np.array(values, dtype=np.float32)
    frame = frame_of(array, dtype)
    got = values_of(compression.expand(compression.compress(frame)).payload, dtype)
    for begin in range(0, len(array), 64):
        block = values_of(frame.payload, dtype)[begin : begin + 64]
        finite = np.isfinite(block).all() and np.abs(block).max() / 127 < 65504
        assert np.isfinite(got[begin : begin + 64]).all() == finite, "a broken block must not look healthy"


def test_zeros_stay_zeros() -> None:
    frame = frame_of(np.zeros(130, np.float32), "bfloat16")
    assert bytes(compression.expand(compression.compress(frame)).payload) == bytes(260)


def test_what_is_no_floating_tensor_stays_as_it_is() -> None:
    numbers = np.arange(6, dtype="<i4").tobytes()
    values = np.ones(64, np.float32)
    tensors = (TensorSpec("int32", (6,)), TensorSpec("float32", (64,)), TensorSpec("float32", (0, 4)))
    sent = compression.compress(Frame(1, tensors, numbers + values.tobytes()))
    assert [spec.encoding for spec in sent.tensors] == ["", "int8", ""]
    back = compression.expand(sent)
    assert back.tensors == tensors
    assert bytes(back.payload)[:24] == numbers


def test_an_uncompressed_frame_is_passed_on_itself() -> None:
    frame = frame_of(np.ones(4, np.float32))
    assert compression.expand(frame) is frame


@pytest.mark.parametrize("spec", [TensorSpec("float32", (64,), "int4"), TensorSpec("int32", (64,), "int8")])
def test_a_form_that_is_not_known_is_refused(spec: TensorSpec) -> None:
    with pytest.raises(LinkMismatch, match="different versions"):
        compression.expand(Frame(1, (spec,), bytes(66)))


def test_a_payload_of_another_length_is_refused() -> None:
    with pytest.raises(LinkMismatch):
        compression.compress(Frame(1, (TensorSpec("float32", (64,)),), bytes(255 * 4)))


class Echo:
    """A runner that sends on what it received."""

    def __init__(self) -> None:
        self.got: Frame | None = None

    def submit(self, header: Microbatch, frame: Frame | None) -> Pending:
        self.got = frame
        return Done(Outcome(frame))


class Done:
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def wait(self) -> Outcome:
        return self.outcome


def test_off_means_the_very_same_bytes() -> None:
    frame = frame_of(np.random.default_rng(0).normal(size=77).astype(np.float32))
    assert CompressingRunner(Echo(), sends=False).submit(Microbatch(7, 1), frame).wait().frame is frame  # type: ignore[arg-type]


def test_a_stage_expands_what_it_gets_and_compresses_what_it_sends() -> None:
    frame = frame_of(np.random.default_rng(0).normal(size=128).astype(np.float32), "bfloat16", (1, 1, 128))
    echo = Echo()
    sent = CompressingRunner(echo, sends=True).submit(Microbatch(7, 1), frame).wait().frame  # type: ignore[arg-type]
    assert echo.got is frame
    assert sent is not None
    assert sent.tensors[0].encoding == "int8"
    CompressingRunner(echo, sends=False).submit(Microbatch(7, 1), sent)  # type: ignore[arg-type]
    assert echo.got is not None
    assert echo.got.tensors == frame.tensors
