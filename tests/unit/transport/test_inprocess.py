"""The link inside one event loop, where the order of events can be told exactly."""

from __future__ import annotations

import asyncio

import pytest

from mlx_cluster.errors import LinkClosed, LinkTimeout
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.transport.inprocess import pair

PATIENT = 30.0


def frame(microbatch_id: int) -> Frame:
    return Frame(microbatch_id, (TensorSpec("uint8", (1,)),), b"x")


async def test_the_payload_is_handed_over_not_copied() -> None:
    send, receive = pair(1)
    payload = bytearray(b"x")
    await send.send(Frame(1, (TensorSpec("uint8", (1,)),), payload), PATIENT)
    assert (await receive.receive(PATIENT)).payload is payload


async def test_no_more_than_the_capacity_is_under_way() -> None:
    send, receive = pair(2)
    await send.send(frame(1), PATIENT)
    await send.send(frame(2), PATIENT)
    with pytest.raises(LinkTimeout, match="microbatch 3"):
        await send.send(frame(3), 0.01)
    assert (await receive.receive(PATIENT)).microbatch_id == 1
    await send.send(frame(4), PATIENT)
    assert [(await receive.receive(PATIENT)).microbatch_id for _ in range(2)] == [2, 4]


async def test_frames_sent_before_the_close_are_received_after_it() -> None:
    send, receive = pair(2)
    await send.send(frame(1), PATIENT)
    await send.close()
    assert (await receive.receive(PATIENT)).microbatch_id == 1
    with pytest.raises(LinkClosed, match="sending stage"):
        await receive.receive(PATIENT)


async def test_closing_wakes_both_sides() -> None:
    send, receive = pair(1)
    await send.send(frame(1), PATIENT)
    blocked = asyncio.create_task(send.send(frame(2), PATIENT))
    await asyncio.sleep(0)
    await receive.close()
    with pytest.raises(LinkClosed, match="receiving stage"):
        await blocked
    with pytest.raises(LinkClosed):
        await receive.receive(PATIENT)


def test_a_link_without_room_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pair(0)
