"""A pipeline of real stage processes with an engine over it, without agents, for end-to-end tests.

Owns: the processes, their gRPC links and the engine; a test may change each stage's spec.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_cluster.config.schema import RuntimeSection, SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.engine.prefix import Limits
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Finished, Sampling, SequenceRequest, Token
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import LinkCommand, StageSpec

PATIENCE_SECONDS = 90.0
EPOCH = Epoch(1, 1)
PREFIX = Limits(max_bytes=10_000_000, bytes_per_position=1000, min_tokens=4)


def plan_over(cuts: Sequence[int]) -> Plan:
    """Stages between these layers: [0, 3, 6] are two of three."""
    stages = tuple(StageAssignment(i, i, a, b) for i, (a, b) in enumerate(itertools.pairwise(cuts)))
    return Plan("pipe", 1, ModelRef("tiny", "hash", cuts[-1]), stages, "grpc")


@asynccontextmanager
async def running_stages(
    model_dir: Path,
    cuts: Sequence[int],
    *,
    change: Callable[[StageSpec], StageSpec] = lambda spec: spec,
    prefix: Limits = PREFIX,
) -> AsyncIterator[PipelineEngine]:
    """Stages between these layers, and an engine with a prefix cache over them."""
    plan = plan_over(cuts)
    async with AsyncExitStack() as stack:
        stages = []
        for index in range(plan.num_stages):
            spec = StageSpec(plan, index, EPOCH, str(model_dir), "127.0.0.1", 0, device="cpu")
            process = await StageProcess.start(change(spec), RuntimeSection())
            stack.push_async_callback(process.stop)
            stages.append(process)
        loaded = await asyncio.gather(*(process.loaded() for process in stages))
        addresses = tuple(event.address for event in loaded)
        await asyncio.gather(*(process.link(LinkCommand("grpc", addresses)) for process in stages))
        engine = PipelineEngine(
            plan,
            EPOCH,
            addresses,
            SchedulerSection(),
            max_context=4096,
            report_deadline_seconds=PATIENCE_SECONDS,
            prefix=prefix,
        )
        stack.push_async_callback(engine.stop)
        await engine.start(PATIENCE_SECONDS)
        yield engine


@dataclass(frozen=True, slots=True)
class Said:
    tokens: tuple[int, ...]
    cached: int


async def say(engine: PipelineEngine, prompt: Sequence[int], num_tokens: int, *, tenant: str = "") -> Said:
    """A greedy answer, and how much of its prompt was not computed again."""
    request = SequenceRequest("r", "tiny", tuple(prompt), num_tokens, Sampling(temperature=0.0), tenant=tenant)
    async with asyncio.timeout(PATIENCE_SECONDS):
        events = [event async for event in engine.generate(request)]
    (end,) = (event for event in events if isinstance(event, Finished))
    return Said(tuple(event.token_id for event in events if isinstance(event, Token)), end.cached_tokens)
