"""Frames on the wire: round trips, and messages that are not what they say."""

from __future__ import annotations

import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.transport import framing

SPECS = st.builds(
    TensorSpec,
    st.sampled_from(sorted(framing.DTYPE_BYTES)),
    st.lists(st.integers(0, 6), max_size=4).map(tuple),
)


@given(st.integers(0, 2**64 - 1), st.lists(SPECS, max_size=4).map(tuple))
def test_a_frame_survives_the_wire(microbatch_id: int, tensors: tuple[TensorSpec, ...]) -> None:
    payload = bytes(number % 251 for number in range(framing.num_bytes(tensors)))
    frame = framing.decode(framing.encode(Frame(microbatch_id, tensors, payload)))
    assert (frame.microbatch_id, frame.tensors, bytes(frame.payload)) == (microbatch_id, tensors, payload)


@given(st.lists(SPECS, max_size=4).map(tuple))
def test_the_payload_starts_where_vector_instructions_can_read_it(tensors: tuple[TensorSpec, ...]) -> None:
    size = framing.num_bytes(tensors)
    assert (len(framing.encode(Frame(1, tensors, bytes(size)))) - size) % 16 == 0


@pytest.mark.parametrize("payload", [b"abcdefgh", bytearray(b"abcdefgh"), array.array("H", [1, 2, 3, 4])])
def test_any_buffer_is_a_payload(payload: bytes) -> None:
    frame = framing.decode(framing.encode(Frame(1, (TensorSpec("uint16", (4,)),), payload)))
    assert bytes(frame.payload) == bytes(memoryview(payload).cast("B"))


def test_a_note_has_tensors_and_no_payload() -> None:
    note = framing.decode(framing.encode(Frame(9, (TensorSpec("bfloat16", (2, 3)),), b"")))
    assert framing.num_bytes(note.tensors) == 12
    assert bytes(note.payload) == b""


@given(st.integers(1, 60))
def test_a_truncated_message_is_refused(cut: int) -> None:
    message = framing.encode(Frame(1, (TensorSpec("float32", (2, 2)), TensorSpec("uint8", (3,))), bytes(19)))
    with pytest.raises(LinkMismatch):
        framing.decode(message[:-cut])


def test_bytes_that_are_no_frame_are_refused() -> None:
    with pytest.raises(LinkMismatch, match="version 71"):
        framing.decode(b"GET / HTTP/1.1\r\nHost: mini1\r\n\r\n")


def test_a_payload_of_another_size_than_its_tensors_is_refused_at_the_sender() -> None:
    with pytest.raises(LinkMismatch, match=r"float32\[2, 3\] take 24 bytes, the payload has 10"):
        framing.encode(Frame(1, (TensorSpec("float32", (2, 3)),), bytes(10)))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(LinkMismatch, match="float8"):
        framing.encode(Frame(1, (TensorSpec("float8", (2,)),), bytes(2)))
