"""The mlx thread: one, in order, and its errors go to whoever asked."""

from __future__ import annotations

import threading

import pytest

from mlx_cluster.stage.device import DeviceThread

PATIENCE_SECONDS = 30.0


async def test_calls_run_in_order_on_one_thread_of_its_own() -> None:
    device = DeviceThread()
    seen: list[int] = []
    for i in range(3):
        device.post(lambda i=i: seen.append(i))  # type: ignore[misc]
    idents = {await device.call(threading.get_ident) for _ in range(3)}
    assert seen == [0, 1, 2]
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    assert await device.close(PATIENCE_SECONDS)


async def test_an_exception_is_raised_where_it_was_asked_for_and_the_thread_lives_on() -> None:
    device = DeviceThread()
    with pytest.raises(ZeroDivisionError):
        await device.call(lambda: 1 / 0)
    device.post(lambda: [][0])
    assert await device.call(lambda: "alive") == "alive"
    assert await device.close(PATIENCE_SECONDS)


async def test_a_thread_that_is_stuck_is_told_as_such() -> None:
    device, gate = DeviceThread(), threading.Event()
    device.post(lambda: gate.wait(PATIENCE_SECONDS) and None)
    assert not await device.close(0.01)
    gate.set()
    assert await device.close(PATIENCE_SECONDS)
