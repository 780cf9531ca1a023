"""How full the pipeline is, with stages that sleep instead of computing. EMULATION: no figure here is a model's speed.

    python benchmarks/fill.py --stages 2 3 4 8 --step-ms 20 --json fill.json

Each stage process is real (processes, gRPC links, threads, scheduler, engine) but its device only sleeps: a decode step
of b rows takes ``step-ms`` · b / 4. With 4·P streams the best any scheduler can do is one step of all rows after the
other on every stage: ``4·P / (P · step)`` tokens a second. Printed: tokens a second against that bound, how busy each
stage was, and what each hop adds to a token's way (median latency of a lone stream less the stage times, for each hop).

``--burn-ms 2`` holds Python for that long before each sleep, as building a real graph does. ``--unequal`` makes the
last stage half again as slow; the bound is then the slowest stage's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record
from mlx_cluster.config.schema import RuntimeSection, SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Sampling, SequenceRequest, Token
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import EmulationSpec, LinkCommand, StageSpec

EPOCH = Epoch(1, 1)
ROWS_PER_STAGE = 4


@dataclass(frozen=True, slots=True)
class Case:
    stages: int
    step_seconds: float
    burn_seconds: float
    slow_last: float  # how much slower the last stage is

    def emulation(self, index: int) -> EmulationSpec:
        factor = self.slow_last if index == self.stages - 1 else 1.0
        return EmulationSpec(
            seconds_per_row=factor * self.step_seconds / ROWS_PER_STAGE, burn_python_seconds=self.burn_seconds
        )

    @property
    def streams(self) -> int:
        return ROWS_PER_STAGE * self.stages

    @property
    def bound_tokens_per_second(self) -> float:
        """All rows through the slowest stage, again and again."""
        return ROWS_PER_STAGE / (self.step_seconds * self.slow_last)


@contextlib.asynccontextmanager
async def pipeline(case: Case, max_groups: int | None = None) -> AsyncIterator[PipelineEngine]:
    stages = tuple(StageAssignment(i, i, i, i + 1) for i in range(case.stages))
    plan = Plan("fill", 1, ModelRef("emulated", "none", case.stages), stages, "grpc")
    async with contextlib.AsyncExitStack() as stack:
        processes = []
        for index in range(case.stages):
            spec = StageSpec(plan, index, EPOCH, "", "127.0.0.1", 0, emulation=case.emulation(index))
            process = await StageProcess.start(spec, RuntimeSection())
            stack.push_async_callback(process.stop)
            processes.append(process)
        addresses = tuple([(await process.loaded()).address for process in processes])
        await asyncio.gather(*(process.link(LinkCommand("grpc", addresses)) for process in processes))
        settings = SchedulerSection(max_groups=max_groups)
        engine = PipelineEngine(plan, EPOCH, addresses, settings, max_context=100_000, report_deadline_seconds=60)
        stack.push_async_callback(engine.stop)
        await engine.start(30)
        yield engine


async def stream(engine: PipelineEngine, tokens: int, times: list[float]) -> None:
    request = SequenceRequest("fill", "emulated", (1, 2, 3, 4), tokens, Sampling(temperature=0.0))
    async for event in engine.generate(request):
        if isinstance(event, Token):
            times.append(time.perf_counter())


async def run(case: Case, seconds: float) -> dict[str, Any]:
    """Streams that all outlast the window; the rate is taken from its middle, where every stage has work."""
    async with pipeline(case) as engine:
        lone: list[float] = []
        await stream(engine, 60, lone)
        trip = statistics.median(b - a for a, b in itertools.pairwise(lone[5:]))
        own = sum(case.emulation(i).seconds_per_row for i in range(case.stages)) + case.stages * case.burn_seconds
        wanted = int(1.5 * seconds * case.bound_tokens_per_second / case.streams) + 20
        times: list[float] = []
        tasks = [asyncio.create_task(stream(engine, wanted, times)) for _ in range(case.streams)]
        await asyncio.sleep(0.25 * seconds)
        busy, began, count = list(engine.statistics()["busy_seconds"]), time.perf_counter(), len(times)
        await asyncio.sleep(seconds)
        elapsed, drawn = time.perf_counter() - began, len(times) - count
        after = engine.statistics()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    rate = drawn / elapsed
    return {
        "stages": case.stages,
        "step_ms": case.step_seconds * 1000,
        "burn_ms": case.burn_seconds * 1000,
        "slow_last": case.slow_last,
        "streams": case.streams,
        "groups": after["groups"],
        "tokens_per_second": round(rate, 2),
        "bound": round(case.bound_tokens_per_second, 2),
        "efficiency": round(rate / case.bound_tokens_per_second, 4),
        "busy": [round((b - a) / elapsed, 3) for a, b in zip(busy, after["busy_seconds"], strict=True)],
        "added_ms_per_hop": round(1000 * (trip - own) / (case.stages + 1), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0, 5.0])
    parser.add_argument("--burn-ms", type=float, default=0.0)
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for step in arguments.step_ms:
        for stages in arguments.stages:
            case = Case(stages, step / 1000, arguments.burn_ms / 1000, 1.5 if arguments.unequal else 1.0)
            runs = [asyncio.run(run(case, arguments.seconds)) for _ in range(arguments.repeat)]
            middle = sorted(runs, key=lambda r: r["efficiency"])[len(runs) // 2]
            print(
                f"EMULATION  {stages} stages  t(b) = {step:g} ms · b/4  {middle['tokens_per_second']:8.1f} tok/s "
                f"of {middle['bound']:.1f} = {middle['efficiency']:.1%}   groups {middle['groups']}   "
                f"busy {min(middle['busy']):.1%} to {max(middle['busy']):.1%}   "
                f"+{middle['added_ms_per_hop']:.2f} ms a hop",
                flush=True,
            )
            results.append({**middle, "runs": runs})
    record.save(arguments.json, "fill", results)


if __name__ == "__main__":
    main()
