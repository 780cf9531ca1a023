"""One engine over several replicas: who is passed over, and what the router's book says."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from mlx_cluster.cluster.routing import Replica, Router
from mlx_cluster.errors import ClusterError, InvalidRequest, Overloaded, StageLost, Unavailable
from mlx_cluster.node.routing import ReadyReplica, RoutedEngine
from mlx_cluster.request import Admitted, Event, Finished, Sampling, SequenceRequest, Token

REQUEST = SequenceRequest("r", "m", (1, 2, 3), 2, Sampling())


class Scripted:
    """Plays its events; an error among them is raised."""

    def __init__(self, *script: Event | ClusterError) -> None:
        self.script, self.asked = script, 0

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        self.asked += 1
        for item in self.script:
            if isinstance(item, ClusterError):
                raise item
            yield item


GOOD = (Admitted(), Token(0, 7), Finished("length", 3, 1))


def routed(*engines: Scripted) -> RoutedEngine:
    ready = [ReadyReplica(Replica(f"m#{index}"), engine) for index, engine in enumerate(engines)]
    now = iter(range(10_000))
    return RoutedEngine(lambda: ready, Router("round_robin", lambda: 0.5), lambda: float(next(now)))


async def collect(engine: RoutedEngine) -> list[Event]:
    return [event async for event in engine.generate(REQUEST)]


@pytest.mark.parametrize("refusal", [Overloaded("full"), Unavailable("starting again"), StageLost("gone")])
async def test_one_that_does_not_admit_is_passed_over(refusal: ClusterError) -> None:
    full, free = Scripted(refusal), Scripted(*GOOD)
    engine = routed(full, free)
    assert await collect(engine) == list(GOOD)
    assert (full.asked, free.asked) == (1, 1)
    assert [book["running"] for book in engine.router.snapshot(0.0).values()] == [0, 0]


async def test_the_last_refusal_is_told_when_nobody_admits() -> None:
    with pytest.raises(Overloaded, match="second"):
        await collect(routed(Scripted(Unavailable("first")), Scripted(Overloaded("second"))))
    with pytest.raises(Unavailable, match="no replica of m is ready"):
        await collect(routed())


async def test_what_was_admitted_is_not_run_again_elsewhere() -> None:
    broken, other = Scripted(Admitted(), Token(0, 7), StageLost("gone")), Scripted(*GOOD)
    with pytest.raises(StageLost):
        await collect(routed(broken, other))
    assert other.asked == 0


async def test_a_bad_request_is_nobodys_failure() -> None:
    engine = routed(Scripted(InvalidRequest("no")), Scripted(*GOOD))
    for _ in range(8):
        try:
            await collect(engine)
        except InvalidRequest:
            continue
    assert not any(book["ejected"] for book in engine.router.snapshot(0.0).values())


async def test_a_client_that_leaves_is_counted_out() -> None:
    engine = routed(Scripted(*GOOD))
    stream = engine.generate(REQUEST)
    assert isinstance(await anext(stream), Admitted)
    assert [book["running"] for book in engine.router.snapshot(0.0).values()] == [1]
    await stream.aclose()
    assert [book["running"] for book in engine.router.snapshot(0.0).values()] == [0]


async def test_a_key_names_its_replica_whoever_asks() -> None:
    keys = [f"{index}:body" for index in range(20)]
    asked: list[list[int]] = []
    for _ in range(2):  # two gateways, each with its own round robin
        engines = [Scripted(*GOOD) for _ in range(3)]
        engine = routed(*engines)
        counts = []
        for key in keys:
            assert [event async for event in engine.generate(replace(REQUEST, key=key))] == list(GOOD)
            counts += [each.asked for each in engines]
        asked.append(counts)
        assert all(each.asked for each in engines)
    assert asked[0] == asked[1]
