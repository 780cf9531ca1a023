"""The ends of the mlx link over a scripted backend: what a note promises, and what a broken promise costs."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import mlx.core as mx
import pytest

from mlx_cluster.errors import LinkClosed, LinkMismatch, LinkTimeout
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.plan import Epoch
from mlx_cluster.transport.inprocess import pair
from mlx_cluster.transport.link import HopId
from mlx_cluster.transport.mlx_link import MlxReceiveEnd, MlxSendEnd

PATIENT = 30.0
HOP = HopId("tiny", Epoch(1, 0), "plan", 0)
SPECS = (TensorSpec("bfloat16", (2, 3)),)


async def loopback(payload: Any) -> mx.array:
    """A backend that takes every send at once."""
    mx.async_eval(payload)
    return payload


async def never(_: Any) -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def peer_lost(_: Any) -> NoReturn:
    raise RuntimeError("[ring] connection to a peer was lost")


async def test_a_note_goes_ahead_of_the_data() -> None:
    notes, received_notes = pair(4)
    end = MlxSendEnd(HOP, notes, loopback)
    await end.send(Frame(5, SPECS, mx.zeros(12, dtype=mx.uint8)), PATIENT)
    note = await received_notes.receive(PATIENT)
    assert (note.microbatch_id, note.tensors, bytes(note.payload)) == (5, SPECS, b"")
    await end.close()


async def test_a_payload_of_another_size_is_refused_before_its_note() -> None:
    notes, received_notes = pair(4)
    end = MlxSendEnd(HOP, notes, loopback)
    with pytest.raises(LinkMismatch, match="take 12 bytes, the payload has 11"):
        await end.send(Frame(5, SPECS, bytes(11)), PATIENT)
    with pytest.raises(LinkTimeout):
        await received_notes.receive(0.0)
    await end.close()


async def test_the_received_array_itself_is_the_payload() -> None:
    notes, received_notes = pair(4)
    data = mx.arange(12, dtype=mx.uint8)
    mx.async_eval(data)
    asked: list[int] = []

    async def post(num_bytes: int) -> mx.array:
        asked.append(num_bytes)
        return data

    end = MlxReceiveEnd(HOP, received_notes, post)
    await notes.send(Frame(5, SPECS, b""), PATIENT)
    frame = await end.receive(PATIENT)
    assert frame.payload is data
    assert (frame.microbatch_id, frame.tensors, asked) == (5, SPECS, [12])
    await end.close()


async def test_nothing_is_posted_before_a_note_came() -> None:
    _notes, received_notes = pair(4)
    end = MlxReceiveEnd(HOP, received_notes, peer_lost)
    for _ in range(2):  # and the receive may be repeated
        with pytest.raises(LinkTimeout, match="sent nothing"):
            await end.receive(0.01)
    await end.close()


async def test_data_that_stay_out_after_their_note_end_the_link() -> None:
    notes, received_notes = pair(4)
    end = MlxReceiveEnd(HOP, received_notes, never)
    await notes.send(Frame(5, SPECS, b""), PATIENT)
    with pytest.raises(LinkTimeout, match="microbatch 5 was announced"):
        await end.receive(0.01)
    with pytest.raises(LinkClosed, match="restart this process"):
        await end.receive(PATIENT)
    await end.close()


async def test_a_send_that_is_not_taken_ends_the_link() -> None:
    notes, _received_notes = pair(4)
    end = MlxSendEnd(HOP, notes, never)
    with pytest.raises(LinkTimeout, match=r"microbatch 5 \(12 bytes\)"):
        await end.send(Frame(5, SPECS, bytes(12)), 0.01)
    with pytest.raises(LinkClosed, match="restart this process"):
        await end.send(Frame(6, SPECS, bytes(12)), PATIENT)
    await end.close()


async def test_a_lost_peer_closes_both_kinds_of_end() -> None:
    notes, received_notes = pair(4)
    sender, receiver = MlxSendEnd(HOP, notes, peer_lost), MlxReceiveEnd(HOP, received_notes, peer_lost)
    for _ in range(2):
        with pytest.raises(LinkClosed, match="stage 1 is gone"):
            await sender.send(Frame(5, SPECS, bytes(12)), PATIENT)
        with pytest.raises(LinkClosed, match="stage 0 is gone"):
            await receiver.receive(PATIENT)
    await sender.close()
    await receiver.close()


async def test_data_on_the_note_stream_are_a_mismatch() -> None:
    notes, received_notes = pair(4)
    end = MlxReceiveEnd(HOP, received_notes, never)
    await notes.send(Frame(5, SPECS, bytes(12)), PATIENT)
    with pytest.raises(LinkMismatch, match="uses a gRPC link"):
        await end.receive(PATIENT)
    await end.close()


async def test_an_empty_tensor_needs_no_data() -> None:
    notes, received_notes = pair(4)
    sender, receiver = MlxSendEnd(HOP, notes, never), MlxReceiveEnd(HOP, received_notes, never)
    empty = (TensorSpec("float32", (0, 4)),)
    await sender.send(Frame(5, empty, b""), PATIENT)
    assert (await receiver.receive(PATIENT)).tensors == empty
    await sender.close()
    await receiver.close()
