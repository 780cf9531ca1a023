from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from mlx_cluster.cluster.addresses import DialledAddresses, RankedAddresses
from mlx_cluster.node.vanished import RefusalProbe, refuses


async def test_only_a_port_without_a_listener_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        assert not await refuses(f"{host}:{port}")
    assert await refuses(f"{host}:{port}")
    assert not await refuses(f"no-such-host.invalid:{port}")


class Looks:
    """A probe of node 1 at two addresses; each look at an address takes the next answer of its script."""

    def __init__(self, first: Sequence[bool], second: Sequence[bool]) -> None:
        self.answers = {"cable:1": list(first), "radio:1": list(second)}
        self.gone: list[tuple[int, float]] = []
        addresses = DialledAddresses({1: RankedAddresses("cable:1", ("radio:1",))})
        self.probe = RefusalProbe(
            addresses,
            lambda node_id, since: self.gone.append((node_id, since)),
            lambda: 7.0,
            refuses=self.refuses,
            again_seconds=0.0,
        )

    async def refuses(self, address: str) -> bool:
        return self.answers[address].pop(0)

    async def done(self) -> None:
        async with asyncio.timeout(30):
            while self.probe.looking:
                await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("first", "second", "gone"),
    [
        ([True, True], [True, True], [(1, 7.0)]),
        ([True, True], [True, False], []),
        ([True, False], [True, True], []),
        ([True], [False], []),
        ([False], [False], []),
    ],
)
async def test_every_address_must_refuse_twice(
    first: list[bool], second: list[bool], gone: list[tuple[int, float]]
) -> None:
    looks = Looks(first, second)
    looks.probe.look(1)
    looks.probe.look(1)  # one look at a time
    await looks.done()
    assert looks.gone == gone
    assert looks.answers == {"cable:1": [], "radio:1": []}


async def test_a_look_that_is_stopped_tells_nothing() -> None:
    looks = Looks([True, True], [True, True])
    looks.probe.look(1)
    looks.probe.stop()
    await looks.done()
    assert looks.gone == []
