"""A generation with a key outlives its stream, for a while and within bounds; the newest attachment has it whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from mlx_cluster.engine import held
from mlx_cluster.engine.held import HeldEngine
from mlx_cluster.errors import IdempotencyKeyReused, StageLost, Superseded, Unavailable
from mlx_cluster.request import Admitted, Event, Finished, Sampling, Scored, SequenceRequest, Token
from tests.fake_engine import Script, ScriptedEngine

REQUEST = SequenceRequest("r", "m", (1, 2, 3), 8, Sampling(seed=7), tenant="t", key="name:body")
TOKENS = (11, 12, 13, 14)
WHOLE: list[Event] = [Admitted(), *(Token(i, t) for i, t in enumerate(TOKENS)), Finished("length", 3, 4)]
BIG = 1 << 20


async def collect(engine: HeldEngine, request: SequenceRequest = REQUEST) -> list[Event]:
    async with contextlib.aclosing(engine.generate(request)) as events:
        return [event async for event in events]


async def read(engine: HeldEngine, count: int, request: SequenceRequest = REQUEST) -> AsyncGenerator[Event]:
    """A stream of which so many events were read."""
    stream = engine.generate(request)
    for _ in range(count):
        await anext(stream)
    return stream


def paced(tokens: int) -> tuple[ScriptedEngine, asyncio.Semaphore]:
    go = asyncio.Semaphore(tokens)
    return ScriptedEngine(Script(tokens=TOKENS, go=go)), go


async def test_a_broken_stream_is_no_cancel_and_the_next_replays_and_goes_on() -> None:
    inner, go = paced(2)
    engine = HeldEngine(inner, 60, BIG)
    await (await read(engine, 3)).aclose()
    assert inner.cancelled == []
    again = engine.generate(REQUEST)
    assert [await anext(again) for _ in range(3)] == WHOLE[:3]
    go.release()
    go.release()
    assert [event async for event in again] == WHOLE[3:]
    assert len(inner.requests) == 1
    assert engine.statistics()["attached_again"] == 1


async def test_it_runs_on_while_nobody_is_attached_and_a_whole_one_is_replayed() -> None:
    inner, go = paced(1)
    engine = HeldEngine(inner, 60, BIG)
    await (await read(engine, 2)).aclose()
    for _ in range(3):
        go.release()
    await inner.until(lambda: bool(inner.finished))
    assert await collect(engine) == await collect(engine) == WHOLE
    assert len(inner.requests) == 1


async def test_the_newest_attachment_has_the_answer() -> None:
    inner, go = paced(1)
    engine = HeldEngine(inner, 60, BIG)
    old = await read(engine, 2)
    waits = asyncio.create_task(anext(old))  # type: ignore[arg-type]  # it is a coroutine
    newer = await read(engine, 2)
    with pytest.raises(Superseded, match="sent again"):
        await waits
    await old.aclose()
    for _ in range(3):
        go.release()
    assert [event async for event in newer] == WHOLE[2:]


async def test_after_the_window_it_is_cancelled_and_runs_again() -> None:
    inner, _ = paced(1)
    engine = HeldEngine(inner, 0.01, BIG)
    await (await read(engine, 2)).aclose()
    await inner.until(lambda: inner.cancelled == [("r", 0)])
    assert engine.statistics() == {"generations_held": 0, "held_unattached": 0, "held_bytes": 0, "attached_again": 0}
    inner.script = Script(tokens=TOKENS)
    assert await collect(engine) == WHOLE
    assert inner.requests == [REQUEST, REQUEST]


async def test_one_that_was_not_admitted_is_cancelled_at_once() -> None:
    admit = asyncio.Event()
    inner = ScriptedEngine(Script(tokens=TOKENS, admit=admit))
    engine = HeldEngine(inner, 60, BIG)
    waits = asyncio.create_task(collect(engine))
    await inner.until(lambda: bool(inner.requests))
    waits.cancel()
    await asyncio.wait([waits])
    assert inner.cancelled == [("r", 0)]
    assert engine.statistics()["generations_held"] == 0


async def test_a_key_stands_for_one_body_of_one_tenant_and_for_each_of_its_choices() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    engine = HeldEngine(inner, 60, BIG)
    assert await collect(engine) == WHOLE
    for choice in (0, 1):
        with pytest.raises(IdempotencyKeyReused, match="another body"):
            await collect(engine, replace(REQUEST, key="name:other", choice=choice))
    await collect(engine, replace(REQUEST, choice=1))
    await collect(engine, replace(REQUEST, key="name:other", tenant="u"))
    assert [(request.tenant, request.choice) for request in inner.requests] == [("t", 0), ("t", 1), ("u", 0)]


async def test_a_lost_engine_is_told_and_nothing_of_it_is_replayed() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS, fail_after=(2, StageLost("gone"))))
    engine = HeldEngine(inner, 60, BIG)
    with pytest.raises(StageLost):
        await collect(engine)
    inner.script = Script(tokens=TOKENS, ends_early=True)
    with pytest.raises(Unavailable, match="ended early"):
        await collect(engine)
    inner.script = Script(tokens=TOKENS)
    assert await collect(engine) == WHOLE


async def test_what_another_engine_gave_is_not_told_to_who_has_it_and_is_to_who_begins_again() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    engine = HeldEngine(inner, 60, BIG)
    resumed = replace(REQUEST, emitted=TOKENS[:2])
    assert await collect(engine, resumed) == [WHOLE[0], *WHOLE[3:]]
    assert await collect(engine) == WHOLE
    assert len(inner.requests) == 1


async def test_a_resume_of_the_same_stream_goes_on_behind_what_it_has() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    engine = HeldEngine(inner, 60, BIG)
    await (await read(engine, 3)).aclose()
    assert await collect(engine, replace(REQUEST, emitted=TOKENS[:2])) == [WHOLE[0], *WHOLE[3:]]
    assert len(inner.requests) == 1


async def test_a_resume_with_other_tokens_runs_by_itself() -> None:
    inner = ScriptedEngine(Script(tokens=(21, 22, 13, 14)))
    engine = HeldEngine(inner, 60, BIG)
    await (await read(engine, 2)).aclose()
    assert await collect(engine, replace(REQUEST, emitted=TOKENS[:2])) == [WHOLE[0], *WHOLE[3:]]
    assert len(inner.requests) == 2


async def test_log_probabilities_that_were_never_heard_here_are_computed_again() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    engine = HeldEngine(inner, 60, BIG)
    scored = replace(REQUEST, sampling=Sampling(seed=7, top_logprobs=1), prompt_logprobs=0)
    await collect(engine, replace(scored, emitted=TOKENS[:2], prompt_logprobs=None))
    events = await collect(engine, scored)
    assert len(inner.requests) == 2
    assert any(isinstance(event, Scored) for event in events)
    assert all(event.logprob is not None for event in events if isinstance(event, Token))
    assert await collect(engine, scored) == events
    assert len(inner.requests) == 2


async def test_beyond_the_bytes_the_oldest_that_nobody_is_attached_to_goes() -> None:
    inner = ScriptedEngine(Script(tokens=TOKENS))
    one = held.GENERATION_BYTES + 3 * held.ID_BYTES + 6 * held.EVENT_BYTES
    engine = HeldEngine(inner, 60, 2 * one)
    for name in "abc":
        await collect(engine, replace(REQUEST, key=f"{name}:body"))
    assert engine.statistics() == {
        "generations_held": 2,
        "held_unattached": 2,
        "held_bytes": 2 * one,
        "attached_again": 0,
    }
    await collect(engine, replace(REQUEST, key="c:body"))
    assert len(inner.requests) == 3
    await collect(engine, replace(REQUEST, key="a:body"))
    assert len(inner.requests) == 4


async def test_one_that_is_too_long_is_served_whole_but_not_held() -> None:
    inner, go = paced(4)
    engine = HeldEngine(inner, 60, held.GENERATION_BYTES + 2 * held.EVENT_BYTES)
    assert await collect(engine) == WHOLE
    assert engine.statistics()["held_bytes"] == engine.statistics()["generations_held"] == 0
    go.release()
    go.release()
    await (await read(engine, 3)).aclose()
    assert inner.cancelled == [("r", 0)]


async def test_so_many_may_run_without_an_attachment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MAX_LEFT_RUNNING", 1)
    inner = ScriptedEngine(Script(tokens=TOKENS, go=asyncio.Semaphore(0)))
    engine = HeldEngine(inner, 60, BIG)
    for name in "ab":
        await (await read(engine, 1, replace(REQUEST, request_id=name, key=f"{name}:body"))).aclose()
    await inner.until(lambda: inner.cancelled == [("a", 0)])
    engine.close()
    await inner.until(lambda: inner.cancelled == [("a", 0), ("b", 0)])
    assert engine.statistics()["generations_held"] == 0
