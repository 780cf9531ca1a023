"""What stands in front of a pipeline's engine, in which order, and that its life stays its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from mlx_cluster.config.schema import ApiGatewaySection, ResponseCacheSection
from mlx_cluster.errors import ClusterError, StageLost
from mlx_cluster.node.composed import ComposedEngine, response_cache
from mlx_cluster.plan import ModelRef, Plan, StageAssignment
from mlx_cluster.request import Admitted, Event, Sampling, SequenceRequest, Token
from tests.fake_engine import Script, ScriptedEngine

PLAN = Plan("m", 1, ModelRef("m", "hash", 2), (StageAssignment(0, 0, 0, 2),), "grpc")
GREEDY = SequenceRequest("r", "m", (1, 2), 3, Sampling(temperature=0.0), repeatable=True)


class Pipeline:
    def __init__(self) -> None:
        self.engine = ScriptedEngine(Script(tokens=(5, 6, 7)))
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.calls: list[object] = []
        self.running = 3
        self.step_seconds = (0.5,)

    async def start(self, timeout_seconds: float) -> None:
        self.calls.append(timeout_seconds)

    async def canary(self, timeout_seconds: float) -> None:
        self.calls.append(timeout_seconds)

    async def stop(self, error: ClusterError | None = None) -> None:
        self.calls.append(error)

    def statistics(self) -> dict[str, object]:
        return {"rows": 0, "held": [(0, 0)]}

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        return self.engine.generate(request)


async def collect(engine: ComposedEngine) -> list[Event]:
    async with contextlib.aclosing(engine.generate(GREEDY)) as events:
        return [event async for event in events]


async def test_both_together_compute_once_at_once_and_never_again(tmp_path: Path) -> None:
    pipeline = Pipeline()
    cache = response_cache(ResponseCacheSection(enabled=True, path="answers.sqlite3"), tmp_path)
    engine = ComposedEngine(pipeline, PLAN, share=True, cache=cache)
    answers = await asyncio.gather(*(collect(engine) for _ in range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert await collect(engine) == answers[0]
    assert len(pipeline.engine.requests) == 1
    figures = engine.statistics()
    assert figures["rows"] == 0
    # Who comes while it is computed joins, who comes after it finds it kept: either, by how fast the disk is.
    assert figures["shared"] + figures["response_cache_hits"] == 4
    assert (tmp_path / "answers.sqlite3").exists()


async def test_without_either_it_is_the_pipeline_alone() -> None:
    pipeline = Pipeline()
    engine = ComposedEngine(pipeline, PLAN, share=False, cache=None)
    await asyncio.gather(collect(engine), collect(engine))
    assert len(pipeline.engine.requests) == 2
    assert engine.statistics() == {"rows": 0, "held": [(0, 0)]}


async def test_the_life_of_the_pipeline_is_its_own() -> None:
    pipeline = Pipeline()
    engine = ComposedEngine(pipeline, PLAN, share=True, cache=None)
    gone = StageLost("gone")
    await engine.start(1.0)
    await engine.canary(2.0)
    await engine.stop(gone)
    assert pipeline.calls == [1.0, 2.0, gone]
    pipeline.lost_reason = "gone"
    assert (engine.running, engine.step_seconds) == (3, (0.5,))
    assert (engine.lost, engine.lost_reason) == (pipeline.lost, "gone")


def test_no_cache_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert response_cache(ResponseCacheSection(), tmp_path) is None


async def test_a_request_with_a_key_is_held_beyond_its_stream_and_any_other_is_not() -> None:
    pipeline = Pipeline()
    engine = ComposedEngine(pipeline, PLAN, share=True, cache=None, reattach=ApiGatewaySection())
    for request in (replace(GREEDY, key="name:body"), GREEDY):
        stream = engine.generate(request)
        assert [await anext(stream), await anext(stream)] == [Admitted(), Token(0, 5)]
        await stream.aclose()
    assert engine.statistics()["generations_held"] == 1
    assert engine.statistics()["held"] == [(0, 0)], "what the stages hold is another figure"
    await engine.stop()
    assert engine.statistics()["generations_held"] == 0


async def test_with_no_window_nothing_is_held() -> None:
    pipeline = Pipeline()
    reattach = ApiGatewaySection(reattach_window=0)
    engine = ComposedEngine(pipeline, PLAN, share=False, cache=None, reattach=reattach)
    stream = engine.generate(replace(GREEDY, key="name:body"))
    await anext(stream)
    await stream.aclose()
    assert pipeline.engine.cancelled == [("r", 0)]
