"""A pipeline of emulated stages for benchmarks: real processes, links, scheduler and engine; the devices only sleep.

Owns: bringing such a pipeline up, alone or behind a real gateway, and streams that read from either.
Does not own: what is measured (``fill``). No figure made with it is a model's speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_cluster.config.schema import ApiGatewaySection, RuntimeSection, SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Engine, Sampling, SequenceRequest, ServedModel, Token
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import EmulationSpec, LinkCommand, StageSpec

EPOCH = Epoch(1, 1)
MAX_CONTEXT = 200_000
START_SECONDS = 60
DEMO = Path(__file__).resolve().parents[1] / "mlx_cluster" / "demo" / "model"  # for its tokenizer


@contextlib.asynccontextmanager
async def pipeline(
    emulations: Sequence[EmulationSpec], settings: SchedulerSection | None = None, *, rehearse: bool = True
) -> AsyncIterator[PipelineEngine]:
    """One stage process for each emulation, linked by gRPC, and an engine that has timed its steps."""
    count = len(emulations)
    stages = tuple(StageAssignment(i, i, i, i + 1) for i in range(count))
    plan = Plan("fill", 1, ModelRef("emulated", "none", count), stages, "grpc")
    async with contextlib.AsyncExitStack() as stack:
        processes = []
        for index, emulation in enumerate(emulations):
            spec = StageSpec(plan, index, EPOCH, "", "127.0.0.1", 0, emulation=emulation)
            process = await StageProcess.start(spec, RuntimeSection())
            stack.push_async_callback(process.stop)
            processes.append(process)
        addresses = tuple([(await process.loaded()).address for process in processes])
        await asyncio.gather(*(process.link(LinkCommand("grpc", addresses)) for process in processes))
        engine = PipelineEngine(
            plan,
            EPOCH,
            addresses,
            settings or SchedulerSection(),
            max_context=MAX_CONTEXT,
            report_deadline_seconds=60,
        )
        stack.push_async_callback(engine.stop)
        await engine.start(START_SECONDS)
        if rehearse:
            await engine.canary(START_SECONDS)
            await engine.rehearsed()
        yield engine


def request(prompt: int, tokens: int) -> SequenceRequest:
    return SequenceRequest("fill", "emulated", (3,) * prompt, tokens, Sampling(temperature=0.0))


async def stream(engine: Engine, tokens: int, times: list[float], *, prompt: int = 4) -> None:
    """One generation straight from the engine; appends when each token came."""
    async for event in engine.generate(request(prompt, tokens)):
        if isinstance(event, Token):
            times.append(time.perf_counter())


# -- behind the gateway ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Routes:
    """Implements ``request.Routes`` for one model."""

    engine: Engine
    served: ServedModel = field(
        default_factory=lambda: ServedModel("emulated", (), str(DEMO), MAX_CONTEXT, int(time.time()), "ready")
    )

    def models(self) -> list[ServedModel]:
        return [self.served]

    def engine_for(self, model_id: str) -> Engine:
        return self.engine


@contextlib.asynccontextmanager
async def gateway(engine: Engine) -> AsyncIterator[int]:
    """A real gateway in front of the engine, in this process as in a node's agent; gives its port."""
    from mlx_cluster.gateway.app import NodeInfo, create_app  # imports much that the other scenarios do without
    from mlx_cluster.gateway.server import GatewayServer

    app = create_app(_Routes(engine), ApiGatewaySection(max_concurrent_requests=1000), NodeInfo(0, "benchmark"))
    await app.state.gateway.catalogue.warm()
    server = GatewayServer(app, "127.0.0.1", 0)
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop()


async def http_stream(port: int, tokens: int, times: list[float]) -> None:
    """One streamed completion over HTTP, read with as little work as possible: the client shares these cores."""
    body = json.dumps(
        {
            "model": "emulated",
            "prompt": [3, 3, 3, 3],
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the gateway says {status!r}: {await reader.read()!r}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    finally:
        writer.close()
