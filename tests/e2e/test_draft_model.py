"""A draft model in a process of its own: same tokens, drafts that come true, and its death disturbs nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_cluster import demo
from mlx_cluster.config.schema import RuntimeSection, SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.engine.speculation import Bounds
from mlx_cluster.errors import CheckpointError
from mlx_cluster.node import draft
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Sampling, SequenceRequest, Token
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import LinkCommand, StageSpec
from tests.tiny_models import write_tiny_model

EPOCH = Epoch(1, 1)
PLAN = Plan("drafted", 1, ModelRef("demo", "none", 28), (StageAssignment(0, 0, 0, 28),), "grpc")
# So long a match never comes: every draft is the model's.
BOUNDS = Bounds("on", 4, 16, wait_seconds=5.0)
ASK = SequenceRequest("r", "demo", (40, 50, 60, 70), 24, Sampling(temperature=2.0, seed=3))


@contextlib.asynccontextmanager
async def serving(wanted: str) -> AsyncIterator[tuple[PipelineEngine, int]]:
    """The engine, and the process of its only stage."""
    async with contextlib.AsyncExitStack() as stack:
        process = await StageProcess.start(
            StageSpec(PLAN, 0, EPOCH, str(demo.model_dir()), "127.0.0.1", 0), RuntimeSection()
        )
        stack.push_async_callback(process.stop)
        address = (await process.loaded()).address
        await process.link(LinkCommand("grpc", (address,)))
        engine = PipelineEngine(
            PLAN,
            EPOCH,
            (address,),
            SchedulerSection(),
            max_context=1000,
            report_deadline_seconds=60,
            drafts=BOUNDS,
            helper=draft.drafting(wanted, demo.model_dir(), (), RuntimeSection()),
        )
        stack.push_async_callback(engine.stop)
        await engine.start(60)
        await engine.canary(60)
        yield engine, process.pid


async def said(engine: PipelineEngine, ask: SequenceRequest) -> list[int]:
    return [event.token_id async for event in engine.generate(ask) if isinstance(event, Token)]


async def until(engine: PipelineEngine, state: str) -> None:
    async with asyncio.timeout(90):
        while not str(engine.statistics()["draft_model"]).startswith(state):
            await asyncio.sleep(0.05)


def children() -> set[int]:
    """Processes whose parent this one is."""
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for each in listed for pid in each.read_text().split()}


async def test_the_model_drafts_for_itself_and_may_be_killed() -> None:
    """The demo model as its own draft model: what it drafts greedily comes true where the draw is the likeliest."""
    others = children()  # of other tests, which may have left a cluster for those that follow
    async with serving(demo.MODEL_NAME) as (engine, stage_pid):
        await until(engine, "ready")
        (pid,) = children() - {stage_pid} - others
        expected = await said(engine, replace(ASK, speculate=False))
        assert engine.statistics()["accepted_tokens"] == 0
        assert await said(engine, ASK) == expected
        greedy = replace(ASK, sampling=Sampling(temperature=0.0))
        answer = await said(engine, replace(greedy, speculate=False))
        assert await said(engine, greedy) == answer
        assert engine.statistics()["accepted_tokens"] > 10
        os.kill(pid, signal.SIGKILL)
        assert await said(engine, ASK) == expected
        await until(engine, "unavailable")
        assert await said(engine, ASK) == expected
        assert not engine.lost.is_set()


async def test_another_vocabulary_is_refused_by_name_and_serving_goes_on(tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", layers=2, width=32, vocab=300)
    with pytest.raises(CheckpointError, match=r"has another vocabulary than .* take a small model of"):
        draft.find(str(other), demo.model_dir(), ())
    async with serving(str(other)) as (engine, _):
        await until(engine, "unavailable")
        assert "another vocabulary" in engine.statistics()["draft_model"]
        assert len(await said(engine, ASK)) == 24


def test_a_model_that_is_not_here_is_named() -> None:
    with pytest.raises(CheckpointError, match="'no/such-model' is not on this machine"):
        draft.find("no/such-model", demo.model_dir(), ())
