"""A lost engine is a pause: streams go on with the ids received so far, in every dialect, or end with a typed error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_cluster.errors import ClusterError, Overloaded, Recovering, RowFailed, StageLost, Unavailable
from mlx_cluster.gateway.attempts import Broken, Patience, attempts
from mlx_cluster.request import Admitted, Engine, Event, Finished, Sampling, SequenceRequest, Token
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script, ScriptedEngine
from tests.unit.gateway.conftest import running

TOKENS = (10, 11, 12, 13, 14)


def request(**changes: Any) -> SequenceRequest:
    values: dict[str, Any] = {"request_id": "r", "model": "tiny", "prompt": (1, 2, 3), "max_tokens": 5}
    return SequenceRequest(**{**values, **changes}, sampling=Sampling())


def breaking(*after: int, tokens: tuple[int, ...] = TOKENS) -> ScriptedEngine:
    """An engine whose k-th stream breaks when it comes to token ``after[k]``; later ones go through."""
    left = list(after)

    def script(_: SequenceRequest) -> Script:
        return Script(tokens=tokens, fail_after=(left.pop(0), StageLost("stage 1 is gone")) if left else None)

    return ScriptedEngine(script)


async def collect(
    asked: SequenceRequest, engine_for: Callable[[], Engine], recovery_seconds: float = 20.0, seconds: float = 20.0
) -> list[Event | Broken]:
    patience = Patience(recovery_seconds, asyncio.get_running_loop().time() + seconds)
    return [event async for event in attempts(asked, engine_for, patience, lambda: 0.0)]


def ids(events: list[Event | Broken]) -> list[tuple[int, int]]:
    return [(event.index, event.token_id) for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("after", [(0,), (1,), (4,), (5,), (0, 0, 1, 1, 3), (5, 5)])
async def test_tokens_come_once_and_in_order_whatever_breaks(after: tuple[int, ...]) -> None:
    engine = breaking(*after)
    events = await collect(request(), lambda: engine)
    assert ids(events) == list(enumerate(TOKENS))
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].completion_tokens) == ("length", 5)
    assert sum(isinstance(event, Finished) for event in events) == 1
    given = [len(asked.emitted) for asked in engine.requests]
    assert given == sorted(given)
    assert given[0] == 0


async def test_a_stream_that_broke_behind_its_last_token_is_not_run_again() -> None:
    engine = breaking(5)
    events = await collect(request(), lambda: engine)
    assert len(engine.requests) == 1
    assert events[-1] == Finished("length", 3, 5)
    engine = breaking(3)
    events = await collect(request(stop_token_ids=frozenset({12})), lambda: engine)
    assert events[-1] == Finished("stop", 3, 3)


async def test_a_resumed_stream_speaks_of_what_was_received_and_of_nothing_else() -> None:
    engine = breaking(2)
    await collect(request(), lambda: engine)
    assert [asked.emitted for asked in engine.requests] == [(), TOKENS[:2]]
    assert {asked.prompt for asked in engine.requests} == {(1, 2, 3)}
    assert {asked.max_tokens for asked in engine.requests} == {5}


async def test_an_index_that_was_not_due_is_an_error() -> None:
    class Repeats:
        async def generate(self, request: SequenceRequest) -> Any:
            yield Admitted()
            yield Token(0, 10)
            yield Token(0, 10)

    with pytest.raises(ClusterError, match="token 0 where token 1 was due"):
        await collect(request(), Repeats)


async def test_no_engine_for_a_while_is_waited_for() -> None:
    engine = breaking(2)
    answers: list[ClusterError | None] = [None, Unavailable("no plan"), Recovering("comes up"), None]

    def engine_for() -> Engine:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return engine

    events = await collect(request(), engine_for)
    assert ids(events) == list(enumerate(TOKENS))
    assert sum(isinstance(event, Broken) for event in events) == 3


@pytest.mark.parametrize("error", [StageLost("stage 1 is gone"), Recovering("comes up"), Overloaded("full")])
async def test_patience_ends_with_the_last_error_and_says_which_limit_it_was(error: ClusterError) -> None:
    engine = ScriptedEngine(Script(tokens=TOKENS, fail_after=(2, error)))
    with pytest.raises(type(error), match="recovery_timeout"):
        await collect(request(), lambda: engine, recovery_seconds=0.0)


async def test_what_another_attempt_would_not_change_is_raised_at_once() -> None:
    for error in (RowFailed("out of memory"), Unavailable("failed: does not fit"), Overloaded("full")):
        engine = ScriptedEngine(Script(refuse=error))
        with pytest.raises(type(error)):
            await collect(request(), lambda engine=engine: engine)
        assert len(engine.requests) == 1
    engine = ScriptedEngine(Script(tokens=TOKENS, fail_after=(2, RowFailed("out of memory"))))
    with pytest.raises(RowFailed):
        await collect(request(), lambda: engine)


async def test_new_work_waits_no_longer_than_to_its_first_token() -> None:
    def nobody() -> Engine:
        raise Recovering("comes up")

    with pytest.raises(Recovering, match=r"^comes up$"):
        await collect(request(), nobody, seconds=0.0)


# -- through a gateway -----------------------------------------------------------------------------------

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2},
    "/v1/completions": {"model": "tiny", "prompt": "hi", "logprobs": 2},
    "/v1/messages": {**CHAT, "max_tokens": 64},
    "/v1/responses": {"model": "tiny", "input": "hi"},
}


def without_ids(value: Any) -> Any:
    """An answer without what differs between any two answers."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if not k.endswith(("id", "_at")) and "created" not in k}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


def parsed(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else without_ids(json.loads(line)) for line in lines]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
async def test_every_dialect_answers_as_if_nothing_had_happened(
    tokenizer_dir: Path, tokenizer: Tokenizer, path: str, stream: bool
) -> None:
    tokens = (*tokenizer.encode("hello w ünd STill OPen"), *tokenizer.eos_token_ids)
    body = {**DIALECTS[path], "stream": stream}
    async with running(tokenizer_dir, tokenizer, recovery_timeout=30) as world:
        world.engine(Script(tokens=tokens))
        quiet = await world.http.post(path, json=body)
        world.routes.engines["tiny"] = broken = breaking(0, 3, 3, 4, 7, len(tokens), tokens=tokens)
        pause = await world.http.post(path, json=body)
        assert len(broken.requests) >= 5
        assert (quiet.status_code, pause.status_code) == (200, 200)
        if stream:
            assert joined(parsed(pause.text)) == joined(parsed(quiet.text))
            assert pause.text.count("[DONE]") == quiet.text.count("[DONE]")
        else:
            assert without_ids(pause.json()) == without_ids(quiet.json())
        assert world.metric("stream_errors_total", code="stage_lost") == 0
        assert world.metric("broken_streams_total", model="tiny") >= 4
        assert world.metric("recovery_seconds_count", model="tiny") >= 1


def joined(events: list[Any]) -> dict[str, Any]:
    """Texts of a stream by choice (how tokens that come at once are cut into events may differ), and its ends."""
    texts: dict[str, str] = {}
    for event in events:
        for name, value in leaves(event):
            if name in ("content", "text", "delta", "token") and isinstance(value, str):
                choice = event["choices"][0]["index"] if event.get("choices") else 0
                texts[f"{name} {choice}"] = texts.get(f"{name} {choice}", "") + value
    ends = [
        leaf for event in events for leaf in leaves(event) if leaf[0] in ("finish_reason", "stop_reason") and leaf[1]
    ]
    return {"texts": texts, "ends": sorted(ends), "last": events[-1] if isinstance(events[-1], str) else None}


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, k)]
    if isinstance(value, list):
        return [leaf for each in value for leaf in leaves(each, name)]
    return [(name, value)]


async def test_the_limits_to_the_next_token_stand_still_while_the_engine_is_away(
    tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    """Both limits are shorter than the engine is away; keep-alives go on meanwhile."""
    tokens = (*tokenizer.encode("hello"), *tokenizer.eos_token_ids)
    async with running(
        tokenizer_dir, tokenizer, recovery_timeout=30, timeout=0.4, idle_timeout=0.4, keepalive_seconds=0.05
    ) as world:
        engine = breaking(0, 1, tokens=tokens)
        world.routes.engines["tiny"] = engine
        away = 0

        def engine_for(_: str) -> Engine:
            nonlocal away
            if len(engine.requests) and away < 12 * len(engine.requests):
                away += 1
                raise Recovering("comes up")
            return engine

        world.routes.engine_for = engine_for  # type: ignore[method-assign]
        answer = await world.http.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert answer.status_code == 200
        assert [event for event in parsed(answer.text) if "error" in event] == []
        assert ": " in answer.text, "no keep-alive"
        assert away == 24


async def test_new_requests_wait_for_a_pipeline_that_comes_back(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, recovery_timeout=30) as world:
        engine = world.engine(text="hello")
        refusals = 3

        def engine_for(_: str) -> Engine:
            nonlocal refusals
            refusals -= 1
            if refusals >= 0:
                raise Recovering("comes up")
            return engine

        world.routes.engine_for = engine_for  # type: ignore[method-assign]
        answer = await world.http.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == "hello"


async def test_new_requests_that_waited_in_vain_are_told_when_to_come_back(
    tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    async with running(tokenizer_dir, tokenizer, recovery_timeout=30, timeout=0.2) as world:

        def engine_for(_: str) -> Engine:
            raise Recovering("stage 1 starts again")

        world.routes.engine_for = engine_for  # type: ignore[method-assign]
        answer = await world.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "stage 1 starts again" in answer.text
