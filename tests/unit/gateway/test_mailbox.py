"""The session's queue: order, bound, time, and a reader or writer that is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from mlx_cluster.gateway.mailbox import Mailbox


def later(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_items_come_in_order_and_wake_the_reader() -> None:
    box: Mailbox[int] = Mailbox(8)
    reader = asyncio.create_task(box.take_until(later(60)))
    await asyncio.sleep(0)
    await box.put(1)
    await box.put(2)
    assert await reader == [1, 2]
    assert box.empty()
    assert box.take() == []
    box.close()


async def test_an_earlier_time_than_the_alarm_s_counts_and_a_later_one_too() -> None:
    box: Mailbox[int] = Mailbox(8)
    await box.put(1)
    assert await box.take_until(later(60)) == [1]
    reader = asyncio.create_task(box.take_until(later(60)))
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    with pytest.raises(TimeoutError):
        await box.take_until(later(0.01))
    with pytest.raises(TimeoutError):
        await box.take_until(later(-1))
    # The alarm that is left rings while the reader waits for later: it must go on waiting.
    first = asyncio.create_task(box.take_until(later(0.01)))
    await asyncio.sleep(0)
    await box.put(3)
    assert await first == [3]
    second = asyncio.create_task(box.take_until(later(60)))
    await asyncio.sleep(0.05)
    assert not second.done()
    await box.put(4)
    assert await second == [4]
    box.close()


async def test_writers_wait_for_room_and_a_cancelled_one_passes_its_turn_on() -> None:
    box: Mailbox[int] = Mailbox(1)
    await box.put(1)
    writers = [asyncio.create_task(box.put(number)) for number in (2, 3, 4)]
    await asyncio.sleep(0)
    assert box.take() == [1]
    writers[0].cancel()  # its turn had just come
    await asyncio.gather(writers[0], return_exceptions=True)
    got = [await box.take_until(later(20)) for _ in range(2)]
    assert got == [[3], [4]]
    await asyncio.gather(*writers[1:])
    assert box.empty()
    box.close()
