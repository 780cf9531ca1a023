"""Identical greedy requests are computed once, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from mlx_cluster.engine.sharing import SharingEngine, same_work
from mlx_cluster.errors import ClusterError, Overloaded, QueueTimeout, StageLost
from mlx_cluster.request import Admitted, Event, Finished, Grammar, Sampling, SequenceRequest, Token
from tests.fake_engine import Script, ScriptedEngine

GREEDY = SequenceRequest("r", "m", (1, 2, 3), 8, Sampling(temperature=0.0), tenant="t")
TOKENS = (11, 12, 13, 14)


def another(**changes: Any) -> SequenceRequest:
    return replace(GREEDY, **changes)


async def collect(engine: SharingEngine, request: SequenceRequest) -> list[Event]:
    async with contextlib.aclosing(engine.generate(request)) as events:
        return [event async for event in events]


def held(tokens: int = 0) -> tuple[ScriptedEngine, asyncio.Semaphore]:
    go = asyncio.Semaphore(tokens)
    return ScriptedEngine(Script(tokens=TOKENS, go=go)), go


WHOLE = [Admitted(), *(Token(i, t) for i, t in enumerate(TOKENS)), Finished("length", 3, 4)]


async def test_requests_at_once_are_computed_once_and_all_hear_everything() -> None:
    inner, go = held()
    engine = SharingEngine(inner)
    listeners = [asyncio.create_task(collect(engine, another(request_id=str(i), choice=i % 2))) for i in range(5)]
    await inner.until(lambda: len(inner.requests) == 1)
    for _ in TOKENS:
        go.release()
    assert await asyncio.gather(*listeners) == [WHOLE] * 5
    assert len(inner.requests) == 1
    assert engine.statistics() == {"shared": 4, "shared_runs": 0}


async def test_who_comes_late_hears_it_from_the_beginning() -> None:
    inner, go = held(2)
    engine = SharingEngine(inner)
    first = asyncio.create_task(collect(engine, GREEDY))
    await inner.until(lambda: inner.num_emitted == 2 or bool(inner.requests))
    while inner.num_emitted < 2:
        await asyncio.sleep(0)
    late = engine.generate(GREEDY)
    heard = [await anext(late) for _ in range(3)]
    assert heard == WHOLE[:3]
    go.release()
    go.release()
    assert [*heard, *[event async for event in late]] == WHOLE
    assert await first == WHOLE


async def test_after_the_end_it_is_computed_again() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    engine = SharingEngine(inner)
    assert await collect(engine, GREEDY) == await collect(engine, GREEDY) == WHOLE
    assert len(inner.requests) == 2


async def test_a_whole_run_may_be_joined_until_its_last_listener_leaves() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    engine = SharingEngine(inner)
    slow = engine.generate(GREEDY)
    await anext(slow)
    await inner.until(lambda: len(inner.finished) == 1)
    assert await collect(engine, GREEDY) == WHOLE
    assert len(inner.requests) == 1
    await slow.aclose()
    assert inner.cancelled == []
    assert engine.statistics()["shared_runs"] == 0


async def test_the_first_ones_leaving_ends_nothing_for_the_others() -> None:
    inner, go = held(1)
    engine = SharingEngine(inner)
    first = engine.generate(GREEDY)
    assert await anext(first) == Admitted()
    second = asyncio.create_task(collect(engine, GREEDY))
    while engine.statistics()["shared"] == 0:
        await asyncio.sleep(0)
    await first.aclose()
    assert inner.cancelled == []
    for _ in TOKENS:
        go.release()
    assert await second == WHOLE
    assert inner.cancelled == []


async def test_the_last_ones_leaving_cancels_before_it_returns() -> None:
    inner, _go = held(1)
    engine = SharingEngine(inner)
    streams = [engine.generate(GREEDY) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    for stream in streams[:2]:
        await stream.aclose()
    assert inner.cancelled == []
    await streams[2].aclose()
    assert inner.cancelled == [("r", 0)]
    assert engine.statistics()["shared_runs"] == 0


async def test_a_listener_that_is_cancelled_while_it_waits_leaves_the_others() -> None:
    inner, go = held()
    engine = SharingEngine(inner)
    first, second = (asyncio.create_task(collect(engine, GREEDY)) for _ in range(2))
    await inner.until(lambda: len(inner.requests) == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    for _ in TOKENS:
        go.release()
    assert await second == WHOLE


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "other"},
        {"model": "other"},
        {"prompt": (1, 2, 4)},
        {"max_tokens": 7},
        {"stop_token_ids": frozenset({5})},
        {"grammar": Grammar("regex", "a+")},
        {"priority": 1},
        {"sampling": Sampling(temperature=0.0, frequency_penalty=0.5)},
        {"sampling": Sampling(temperature=0.0, top_logprobs=2)},
        {"sampling": Sampling(temperature=0.0, logit_bias=((3, 1.0),))},
        {"emitted": (11,)},
        {"key": "again"},
        {"sampling": Sampling(temperature=0.5)},
    ],
)
async def test_whatever_is_not_the_same_runs_by_itself(changes: dict[str, Any]) -> None:
    inner, go = held()
    engine = SharingEngine(inner)
    both = [asyncio.create_task(collect(engine, each)) for each in (GREEDY, another(**changes))]
    await inner.until(lambda: len(inner.requests) == 2)
    for _ in range(2 * len(TOKENS)):
        go.release()
    await asyncio.gather(*both)
    assert engine.statistics()["shared"] == 0


async def test_sampled_requests_are_never_shared() -> None:
    inner, go = held()
    engine = SharingEngine(inner)
    sampled = another(sampling=Sampling(temperature=0.7, seed=3))
    both = [asyncio.create_task(collect(engine, sampled)) for _ in range(2)]
    await inner.until(lambda: len(inner.requests) == 2)
    for _ in range(2 * len(TOKENS)):
        go.release()
    await asyncio.gather(*both)


def test_seed_and_choice_count_only_where_something_is_drawn() -> None:
    assert same_work(another(choice=3, request_id="x", priority=4)) == same_work(GREEDY)
    drawn = another(sampling=Sampling(temperature=1.0, seed=1))
    assert same_work(drawn) != same_work(replace(drawn, choice=1))
    assert same_work(drawn) != same_work(replace(drawn, sampling=Sampling(temperature=1.0, seed=2)))


async def test_an_error_reaches_everybody() -> None:
    go = asyncio.Semaphore(1)
    inner = ScriptedEngine(Script(tokens=TOKENS, go=go, fail_after=(1, StageLost("gone"))))
    engine = SharingEngine(inner)
    results = await asyncio.gather(*(collect(engine, GREEDY) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in results] == ["gone"] * 3
    assert all(isinstance(error, StageLost) for error in results)
    assert len(inner.requests) == 1


async def test_a_bug_behind_it_is_an_error_and_not_silence() -> None:
    engine = SharingEngine(ScriptedEngine(Script(refuse=RuntimeError("bug"))))
    with pytest.raises(ClusterError, match="bug"):
        await collect(engine, GREEDY)


async def test_a_stream_that_ends_early_is_an_error() -> None:
    engine = SharingEngine(ScriptedEngine(Script(tokens=TOKENS, ends_early=True)))
    with pytest.raises(ClusterError, match="ended early"):
        await collect(engine, GREEDY)


async def test_who_joined_one_that_lost_patience_goes_on_with_its_own() -> None:
    admit = asyncio.Event()

    class LosesPatience(ScriptedEngine):
        async def generate(self, request: SequenceRequest):  # type: ignore[no-untyped-def, override]
            if not self.requests:
                self.requests.append(request)
                await admit.wait()
                raise QueueTimeout("too late")
            async for event in super().generate(request):
                yield event

    inner = LosesPatience(Script(tokens=TOKENS))
    engine = SharingEngine(inner)
    runs = [asyncio.create_task(collect(engine, another(queue_seconds=60.0))) for _ in range(3)]
    while engine.statistics()["shared"] < 2:
        await asyncio.sleep(0)
    admit.set()
    results = await asyncio.gather(*runs, return_exceptions=True)
    assert sorted(isinstance(result, Overloaded) for result in results) == [False, False, True]
    assert [result for result in results if isinstance(result, list)] == [WHOLE, WHOLE]
    assert len(inner.requests) == 2
    assert inner.requests[1].queue_seconds is not None
    assert inner.requests[1].queue_seconds <= 60.0
