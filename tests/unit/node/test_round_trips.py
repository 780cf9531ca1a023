from __future__ import annotations

import asyncio
import socket

from mlx_cluster.cluster.addresses import DialledAddresses, RankedAddresses
from mlx_cluster.node.round_trips import CONNECT_SECONDS, RoundTripProbe, connect_seconds


def test_a_handshake_is_timed_and_silence_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        seconds = connect_seconds(f"127.0.0.1:{port}")
        assert seconds is not None
        assert 0.0 < seconds <= CONNECT_SECONDS
    assert connect_seconds(f"127.0.0.1:{port}") is None
    assert connect_seconds("no-such-host.invalid:1") is None


def test_a_look_measures_every_address_and_chooses() -> None:
    answers: dict[str, float | None] = {"bridge:1": 0.0002, "host:1": 0.001, "other:1": None}
    dialled = DialledAddresses({1: RankedAddresses("host:1", ["bridge:1"]), 2: RankedAddresses("other:1")})
    probe = RoundTripProbe(dialled, {1: "mini1", 2: "mini2"}, 5.0, measure=answers.__getitem__)
    probe.look()
    assert dict(dialled) == {1: "bridge:1", 2: "other:1"}
    assert dialled.round_trips() == ((1, 0.0002),)
    answers["bridge:1"] = None
    probe.look()
    assert dict(dialled) == {1: "host:1", 2: "other:1"}


def test_hints_are_measured_after_the_configured_addresses() -> None:
    hints: dict[int, tuple[str, ...]] = {1: ("hint:1",)}
    dialled = DialledAddresses({1: RankedAddresses("host:1")})
    asked: list[str] = []

    def measure(address: str) -> float | None:
        asked.append(address)
        return 0.001 if address == "hint:1" else None

    probe = RoundTripProbe(dialled, {1: "mini1"}, 5.0, hints=lambda node: hints.get(node, ()), measure=measure)
    probe.look()
    assert (asked, dict(dialled)) == (["host:1", "hint:1"], {1: "hint:1"})
    hints.clear()
    probe.look()
    assert dict(dialled) == {1: "host:1"}


def test_a_probe_that_was_told_to_stop_asks_nobody() -> None:
    asked: list[str] = []

    def measure(address: str) -> float | None:
        asked.append(address)
        return None

    probe = RoundTripProbe(DialledAddresses({1: RankedAddresses("host:1")}), {1: "mini1"}, 5.0, measure=measure)
    probe.stop()
    probe.look()
    assert asked == []


async def test_the_thread_looks_once_per_interval() -> None:
    loop, looked = asyncio.get_running_loop(), asyncio.Event()

    def measure(_address: str) -> float | None:
        loop.call_soon_threadsafe(looked.set)
        return 0.001

    dialled = DialledAddresses({1: RankedAddresses("host:1")})
    probe = RoundTripProbe(dialled, {1: "mini1"}, 0.01, measure=measure)
    probe.start()
    try:
        for _ in range(2):
            await asyncio.wait_for(looked.wait(), 30)
            looked.clear()
    finally:
        probe.stop()
        await asyncio.to_thread(probe._thread.join, 30)
    assert not probe._thread.is_alive()
