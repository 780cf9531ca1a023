"""Tokens through real stage processes equal mlx-lm's own, for every split, link and number of concurrent requests."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from mlx_cluster.config.schema import RuntimeSection, SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.engine.prefix import Limits
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment, ranges_from_counts
from mlx_cluster.request import Finished, Sampling, SequenceRequest, Token
from mlx_cluster.stage.device import DeviceThread
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.service import StageService
from mlx_cluster.stage.spec import LinkCommand, StageSpec
from mlx_cluster.stage.worker import Worker
from mlx_cluster.transport import inprocess
from tests.reference_tokens import Reference, reference_tokens
from tests.tiny_models import write_tiny_model

LAYERS = 28
NUM_TOKENS = 12
CHUNK = 16
CLEAR_GAP = 1e-3
EPOCH = Epoch(1, 1)
PATIENCE_SECONDS = 90.0
SPLITS = {"28": [28], "10/9/9": [10, 9, 9], "1/27": [1, 27], "7/7/7/7": [7, 7, 7, 7]}


def prompts() -> list[tuple[int, ...]]:
    """Lengths around the chunk size: one token, within a chunk, exactly one, several."""
    rng = random.Random(7)
    lengths = [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5, 40, 23, 9, 50, 12, 31, 6]
    return [tuple(rng.randrange(256) for _ in range(n)) for n in lengths]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("m") / "tiny", layers=LAYERS, width=64, vocab=320)


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "tiny4"
    return write_tiny_model(path, layers=LAYERS, width=64, vocab=320, quantize_bits=4, dtype="bfloat16")


@pytest.fixture(scope="module")
def references(model_dir: Path) -> list[Reference]:
    return clear(reference_tokens(model_dir, prompts(), NUM_TOKENS))


def clear(references: list[Reference]) -> list[Reference]:
    chosen = [r for r in references if r.gap > CLEAR_GAP][:8]
    assert len(chosen) == 8, [r.gap for r in references]
    return chosen


def plan_of(counts: list[int], transport: str) -> Plan:
    ranges = ranges_from_counts(counts, LAYERS)
    stages = tuple(StageAssignment(i, i, start, end) for i, (start, end) in enumerate(ranges))
    return Plan("pipe", 1, ModelRef("tiny", "hash", LAYERS), stages, transport)


def spec_of(plan: Plan, index: int, model_dir: Path, dequantize: str = "auto") -> StageSpec:
    return StageSpec(plan, index, EPOCH, str(model_dir), "127.0.0.1", 0, device="cpu", dequantize=dequantize)  # type: ignore[arg-type]


@asynccontextmanager
async def engine_over(plan: Plan, addresses: list[str]) -> AsyncIterator[PipelineEngine]:
    engine = PipelineEngine(
        plan,
        EPOCH,
        addresses,
        SchedulerSection(prefill_chunk=CHUNK),
        max_context=4096,
        report_deadline_seconds=PATIENCE_SECONDS,
        prefix=Limits(max_bytes=10_000_000, bytes_per_position=1000, min_tokens=4),
    )
    try:
        await engine.start(PATIENCE_SECONDS)
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def processes(plan: Plan, model_dir: Path, dequantize: str = "auto") -> AsyncIterator[PipelineEngine]:
    """Real stage processes, linked as the plan says, and an engine over them."""
    async with AsyncExitStack() as stack:
        running = []
        for index in range(plan.num_stages):
            process = await StageProcess.start(spec_of(plan, index, model_dir, dequantize), RuntimeSection())
            stack.push_async_callback(process.stop)
            running.append(process)
        loaded = await asyncio.gather(*(process.loaded() for process in running))
        addresses = [event.address for event in loaded]
        command = LinkCommand(plan.transport, tuple(addresses), tuple(free_addresses(plan.num_stages)))
        await asyncio.gather(*(process.link(command) for process in running))
        yield await stack.enter_async_context(engine_over(plan, addresses))


@asynccontextmanager
async def one_process(plan: Plan, model_dir: Path) -> AsyncIterator[PipelineEngine]:
    """All stages in this process over in-process links; one thread owns mlx for all of them."""
    from mlx_cluster.model.runner import SliceRunner

    device = DeviceThread()
    hops = [inprocess.pair(4) for _ in range(plan.num_stages - 1)]
    tasks: list[asyncio.Task[None]] = []
    services: list[StageService] = []
    try:
        for stage in plan.stages:
            service = StageService("127.0.0.1", 0)
            stream = service.enter(spec_of(plan, stage.index, model_dir))
            services.append(service)

            def load(start: int = stage.start, end: int = stage.end) -> SliceRunner:
                return SliceRunner.load(model_dir, start, end, device="cpu")

            worker = Worker(
                stage.index,
                await device.call(load),
                device,
                receive=hops[stage.index - 1][1] if stage.index > 0 else None,
                send=hops[stage.index][0] if stage.index < len(hops) else None,
                link_timeout_seconds=PATIENCE_SECONDS,
                on_report=stream.report,
            )
            stream.begin(worker)
            tasks.append(asyncio.create_task(worker.run()))
        addresses = [await service.start() for service in services]
        async with engine_over(plan, addresses) as engine:
            yield engine
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for service in services:
            await service.close()
        assert await device.close(10)


def free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


async def tokens_of(engine: PipelineEngine, reference: Reference) -> tuple[int, ...]:
    return tuple([e.token_id async for e in engine.generate(request_of(reference)) if isinstance(e, Token)])


def request_of(reference: Reference) -> SequenceRequest:
    return SequenceRequest("r", "tiny", reference.prompt, NUM_TOKENS, Sampling(temperature=0.0))


async def check(engine: PipelineEngine, references: list[Reference]) -> None:
    """One alone, then eight at once, then again from the prefix cache."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await tokens_of(engine, references[0]) == references[0].tokens
        answers = await asyncio.gather(*(tokens_of(engine, reference) for reference in references))
        assert answers == [reference.tokens for reference in references]
        again = [[e async for e in engine.generate(request_of(reference))] for reference in references]
        assert [tuple(e.token_id for e in events if isinstance(e, Token)) for events in again] == answers
        assert sum(e.cached_tokens for events in again for e in events if isinstance(e, Finished)) > 100
        assert engine.statistics()["prefix_fallbacks"] == 0


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("transport", ["grpc", "ring"])
async def test_stage_processes_give_mlx_lms_tokens(
    split: str, transport: str, model_dir: Path, references: list[Reference]
) -> None:
    async with processes(plan_of(SPLITS[split], transport), model_dir) as engine:
        await check(engine, references)


@pytest.mark.parametrize("split", list(SPLITS))
async def test_in_process_links_give_mlx_lms_tokens(split: str, model_dir: Path, references: list[Reference]) -> None:
    async with one_process(plan_of(SPLITS[split], "inprocess"), model_dir) as engine:
        await check(engine, references)


@pytest.mark.parametrize("dequantize", ["never", "always"])
async def test_quantized_weights_give_mlx_lms_tokens(dequantize: str, quantized_dir: Path) -> None:
    always = dequantize == "always"
    references = clear(reference_tokens(quantized_dir, prompts(), NUM_TOKENS, dequantize=always))
    async with processes(plan_of([10, 9, 9], "grpc"), quantized_dir, dequantize) as engine:
        await check(engine, references)
