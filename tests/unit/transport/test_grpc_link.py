"""The gRPC link's own promises: who may attach to a hop, and what is held, refused and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import grpc.aio
import pytest

from mlx_cluster.errors import Fenced, LinkClosed, LinkError, LinkMismatch, LinkTimeout, LinkUnavailable
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.plan import Epoch
from mlx_cluster.transport.grpc_link import HOP_KEY, METHOD, SERVICE, HiddenStates, connect, decode_hop, encode_hop
from mlx_cluster.transport.link import HopId
from tests.unit.transport.listening import listening

PATIENT = 30.0
HOP = HopId("pipeline with ünicode", Epoch(2, 1), "plan", 0)


def frame(microbatch_id: int, size: int = 1) -> Frame:
    return Frame(microbatch_id, (TensorSpec("uint8", (size,)),), bytes(size))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENT):
        while not condition():
            await asyncio.sleep(0)


async def error_of(attempt: Awaitable[object]) -> Exception:
    with pytest.raises((LinkError, Fenced)) as raised:
        await attempt
    return raised.value


def test_a_hop_survives_its_metadata() -> None:
    assert decode_hop(encode_hop(HOP)) == HOP


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"pipeline": "p", "epoch": "x", "plan_hash": "h", "sender": 0}'])
def test_metadata_that_names_no_hop_is_a_mismatch(data: bytes) -> None:
    with pytest.raises(LinkMismatch):
        decode_hop(data)


async def test_a_stream_that_comes_early_is_held_until_it_is_expected() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        connecting = asyncio.create_task(connect(address, HOP, PATIENT))
        await until(lambda: hidden.num_held == 1)
        receive = hidden.expect(HOP, 1)
        send = await connecting
        await receive.connected(PATIENT)
        await send.send(frame(7), PATIENT)
        assert (await receive.receive(PATIENT)).microbatch_id == 7
        assert hidden.num_held == 0
        await send.close()


async def test_a_stream_that_nobody_expects_is_refused_in_the_end() -> None:
    hidden = HiddenStates(hold_seconds=0.05)
    async with listening(hidden) as address:
        error = await error_of(connect(address, HOP, PATIENT))
        assert isinstance(error, LinkUnavailable)
        assert "not expected within 0.05 s" in str(error)


async def test_only_a_few_streams_are_held() -> None:
    hidden = HiddenStates(max_held=1)
    async with listening(hidden) as address:
        first = asyncio.create_task(connect(address, HOP, PATIENT))
        await until(lambda: hidden.num_held == 1)
        error = await error_of(connect(address, replace(HOP, sender=4), PATIENT))
        assert isinstance(error, LinkUnavailable)
        assert "1 other streams wait" in str(error)
        hidden.expect(HOP, 1)
        await (await first).close()


@pytest.mark.parametrize(
    ("hop", "kind", "word"),
    [
        (replace(HOP, epoch=Epoch(2, 0)), Fenced, "epoch 2.1 is in force"),
        (replace(HOP, epoch=Epoch(1, 9)), Fenced, "epoch 2.1 is in force"),
        (replace(HOP, epoch=Epoch(1, 9), sender=3), Fenced, "epoch 2.1 is in force"),
        (replace(HOP, plan_hash="other"), LinkMismatch, "stage 0 follows plan other, stage 1 plan plan"),
    ],
)
async def test_another_epoch_or_plan_is_refused(hop: HopId, kind: type[Exception], word: str) -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        hidden.expect(HOP, 1)
        error = await error_of(connect(address, hop, PATIENT))
        assert type(error) is kind
        assert word in str(error)


async def test_a_second_stream_of_one_hop_is_refused() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        hidden.expect(HOP, 1)
        send = await connect(address, HOP, PATIENT)
        assert isinstance(await error_of(connect(address, HOP, PATIENT)), LinkMismatch)
        await send.send(frame(1), PATIENT)
        await send.close()


async def test_a_newer_epoch_takes_over_and_the_older_cannot_return() -> None:
    hidden = HiddenStates()
    newer = replace(HOP, epoch=Epoch(2, 2))
    async with listening(hidden) as address:
        old_receive = hidden.expect(HOP, 1)
        old_send = await connect(address, HOP, PATIENT)
        hidden.expect(newer, 1)
        error = await error_of(old_receive.receive(PATIENT))
        assert isinstance(error, LinkClosed)
        assert "epoch 2.2 took over" in str(error)
        await (await connect(address, newer, PATIENT)).close()
        with pytest.raises(Fenced, match=r"epoch 2\.2 is in force"):
            hidden.expect(HOP, 1)
        await old_send.close()


async def test_a_call_that_names_no_hop_is_refused() -> None:
    async with listening(HiddenStates()) as address, grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        assert await asyncio.wait_for(call.code(), PATIENT) is grpc.StatusCode.FAILED_PRECONDITION
        assert HOP_KEY in await call.details()


async def test_bytes_that_are_no_frame_end_the_link_with_a_mismatch() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address, grpc.aio.insecure_channel(address) as channel:
        receive = hidden.expect(HOP, 1)
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((HOP_KEY, encode_hop(HOP)),))
        assert decode_hop(await call.read()) == HOP
        await call.write(b"not a frame, but long enough to have a head")
        assert isinstance(await error_of(receive.receive(PATIENT)), LinkMismatch)
        assert await asyncio.wait_for(call.code(), PATIENT) is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_receiver_that_takes_nothing_holds_the_sender_back() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        receive = hidden.expect(HOP, 2)
        send = await connect(address, HOP, PATIENT)
        with pytest.raises(LinkTimeout, match=r"microbatch \d+ \(4194") as timeout:
            await _send_for_ever(send.send, timeout_seconds=1.0)
        assert int(str(timeout.value).partition("microbatch ")[2].split()[0]) < 20
        error = await error_of(send.send(frame(99), PATIENT))
        assert isinstance(error, LinkClosed)
        for expected in range(2):
            assert (await receive.receive(PATIENT)).microbatch_id == expected
        await send.close()


async def test_closing_a_sender_wakes_its_blocked_send() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        hidden.expect(HOP, 1)
        send = await connect(address, HOP, PATIENT)
        blocked = asyncio.create_task(_send_for_ever(send.send))
        await asyncio.sleep(0)
        await send.close()
        assert isinstance(await error_of(blocked), LinkClosed)
        await send.close()


async def test_a_cancelled_send_passes_the_cancellation_on_and_ends_the_link() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        hidden.expect(HOP, 1)
        send = await connect(address, HOP, PATIENT)
        blocked = asyncio.create_task(_send_for_ever(send.send))
        await asyncio.sleep(0.2)  # until the window is full; sooner only means that another frame is cut
        blocked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await blocked
        assert isinstance(await error_of(send.send(frame(1), PATIENT)), LinkClosed)
        await send.close()


async def test_a_stage_that_does_not_answer_is_named() -> None:
    with pytest.raises(LinkUnavailable, match=r"stage 1 at 127\.0\.0\.1:1 did not answer within 0\.2 s"):
        await connect("127.0.0.1:1", HOP, 0.2)


async def test_a_sender_that_never_comes_is_named() -> None:
    with pytest.raises(LinkUnavailable, match=r"stage 0 did not connect within 0\.01 s"):
        await HiddenStates().expect(HOP, 1).connected(0.01)


async def _send_for_ever(send: Callable[[Frame, float], Awaitable[None]], timeout_seconds: float = PATIENT) -> None:
    number = 0
    while True:
        await send(frame(number, 4 * 1024 * 1024), timeout_seconds)
        number += 1


async def test_behind_a_fence_nothing_of_an_older_epoch_is_taken() -> None:
    hidden = HiddenStates()
    async with listening(hidden) as address:
        before = hidden.expect(HOP, 2)
        end = await connect(address, HOP, PATIENT)
        newer = replace(HOP, epoch=Epoch(HOP.epoch.version, HOP.epoch.incarnation + 1))
        early = asyncio.create_task(connect(address, replace(HOP, sender=HOP.sender + 1), PATIENT))
        await until(lambda: hidden.num_held == 1)
        hidden.fence(HOP.pipeline, newer.epoch)
        assert isinstance(await error_of(before.receive(PATIENT)), LinkClosed)
        assert isinstance(await error_of(early), Fenced), "a stream that waited is out of date now"
        assert isinstance(await error_of(connect(address, HOP, PATIENT)), Fenced)
        with pytest.raises(Fenced):
            hidden.expect(HOP, 2)
        await end.close()
        after = hidden.expect(newer, 2)
        again = await connect(address, newer, PATIENT)
        await again.send(frame(7), PATIENT)
        assert (await after.receive(PATIENT)).microbatch_id == 7
        await again.close()
