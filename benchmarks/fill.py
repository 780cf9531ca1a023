"""How full the pipeline is, with stages that sleep instead of computing. EMULATION: no figure here is a model's speed.

    python benchmarks/fill.py --json fill.json                        # 20 ms and 5 ms over 2, 3, 4 and 8 stages
    python benchmarks/fill.py --gateway                               # the same, read over HTTP from a real gateway
    python benchmarks/fill.py --burn-ms 2                             # steps that hold Python, as building a graph does
    python benchmarks/fill.py --unequal --stages 3                    # the last stage half again as slow
    python benchmarks/fill.py --scenario shapes --stages 3            # flat, linear, stairs: against every fixed number
    python benchmarks/fill.py --scenario ttft itl --stages 3          # long prompts, alone and beside streams

Each stage process is real (processes, gRPC links, threads, scheduler, engine) but its device only sleeps.

``steps``: a decode step of b rows takes ``step-ms`` · b / 4, and 4·P streams run over P stages. The best any scheduler
can do is one step of all rows after the other on the slowest stage. Printed: tokens a second against that bound, how
busy each stage was, and what a hop adds to a token's way (median time between a lone stream's tokens at the engine,
less the stage times as the stages report them, for each of the P + 1 hops that a step makes).

``shapes``: the same streams over t(b) flat, linear and in stairs, with the number of groups left to the engine, and
fixed at 1, 2 … 2·P.

``ttft``: a prompt alone; against T/P · (1 + (P − 1)/m) for its m chunks and the sum T of its stage times.
``itl``: 2·P streams while 16,384 tokens are prefilled; the 99th percentile of the time between tokens against
max(n·t + c, (P − 1)·c + t), for n groups, a step t and the longest chunk c on the slowest stage.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import emulated, record
from mlx_cluster import log
from mlx_cluster.config.schema import SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.microbatch import Kind, Report
from mlx_cluster.stage.spec import EmulationSpec

ROWS_PER_STAGE = 4
LONE_TOKENS = 60
LONG_PROMPT = 16_384
PROMPTS = (1_024, 4_096, 16_384)
# A chunk on each stage: 4 ms, and 0.1 ms for a token, twice that behind 16,384 others.
CHUNK_SECONDS, TOKEN_SECONDS, SQUARE_SECONDS = 0.004, 0.0001, 3e-9


# -- steps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    stages: int
    step_seconds: float
    burn_seconds: float = 0.0
    slow_last: float = 1.0  # how much slower the last stage is
    gateway: bool = False

    def emulations(self) -> list[EmulationSpec]:
        last = self.stages - 1
        return [
            EmulationSpec(
                seconds_per_row=(self.slow_last if index == last else 1.0) * self.step_seconds / ROWS_PER_STAGE,
                burn_python_seconds=self.burn_seconds,
            )
            for index in range(self.stages)
        ]

    @property
    def streams(self) -> int:
        return ROWS_PER_STAGE * self.stages

    @property
    def bound_tokens_per_second(self) -> float:
        """All rows through the slowest stage, again and again."""
        return ROWS_PER_STAGE / (self.step_seconds * self.slow_last)


async def steps(case: Case, seconds: float) -> dict[str, Any]:
    async with emulated.pipeline(case.emulations()) as engine:
        lone: list[float] = []
        busy = sum(engine.statistics()["busy_seconds"])
        await emulated.stream(engine, LONE_TOKENS, lone)
        trip = statistics.median(b - a for a, b in itertools.pairwise(lone[5:]))
        own = (sum(engine.statistics()["busy_seconds"]) - busy) / (LONE_TOKENS - 1)  # the prompt costs these nothing
        if case.gateway:
            async with emulated.gateway(engine) as port:
                window = await _window(
                    engine, lambda tokens, times: emulated.http_stream(port, tokens, times), case, seconds
                )
        else:
            window = await _window(engine, lambda tokens, times: emulated.stream(engine, tokens, times), case, seconds)
    return {
        "stages": case.stages,
        "step_ms": case.step_seconds * 1000,
        "burn_ms": case.burn_seconds * 1000,
        "slow_last": case.slow_last,
        "gateway": case.gateway,
        "streams": case.streams,
        **window,
        "bound": round(case.bound_tokens_per_second, 2),
        "efficiency": round(window["tokens_per_second"] / case.bound_tokens_per_second, 4),
        "added_ms_per_hop": round(1000 * (trip - own) / (case.stages + 1), 3),
    }


Stream = Callable[[int, list[float]], Awaitable[None]]


async def _window(engine: PipelineEngine, stream: Stream, case: Case, seconds: float) -> dict[str, Any]:
    """Streams that all outlast the window; the rate is taken from its middle, where every stage has work."""
    wanted = int(2 * seconds * case.bound_tokens_per_second / case.streams) + 40
    return await _rate(engine, stream, case.streams, wanted, seconds)


async def _rate(engine: PipelineEngine, stream: Stream, streams: int, wanted: int, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    tasks = [asyncio.ensure_future(stream(wanted, times)) for _ in range(streams)]
    try:
        await asyncio.sleep(0.4 * seconds)
        busy, began, count = list(engine.statistics()["busy_seconds"]), time.perf_counter(), len(times)
        await asyncio.sleep(seconds)
        elapsed, drawn = time.perf_counter() - began, len(times) - count
        after = engine.statistics()
        for task in tasks:
            if task.done():
                task.result()  # a stream that broke says why; one that ended was too short for the window
                raise RuntimeError("a stream ended within the window: ask for fewer seconds")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "tokens_per_second": round(drawn / elapsed, 2),
        "groups": after["groups"],
        "busy": [round((b - a) / elapsed, 3) for a, b in zip(busy, after["busy_seconds"], strict=True)],
    }


# -- shapes ----------------------------------------------------------------------------------------------


def shapes(stages: int) -> dict[str, EmulationSpec]:
    streams = ROWS_PER_STAGE * stages
    return {
        "flat": EmulationSpec(seconds_per_step=0.02),
        "linear": EmulationSpec(seconds_per_row=0.005),
        "affine": EmulationSpec(seconds_per_step=0.012, seconds_per_row=0.00125),
        "stairs": EmulationSpec(seconds_per_step=0.02, rows_per_step=max(2, streams // 2 - 1)),
    }


async def shape(name: str, stages: int, seconds: float) -> dict[str, Any]:
    """The engine's own number of groups beside every fixed one."""
    rates: dict[str, dict[str, Any]] = {}
    for groups in (None, *range(1, 2 * stages + 1)):
        async with emulated.pipeline([shapes(stages)[name]] * stages) as engine:
            engine._fill.pinned = groups  # the sweep holds the number still, as a rehearsal does
            streams = ROWS_PER_STAGE * stages
            wanted = int(3 * seconds / 0.005) + 40
            rates["chosen" if groups is None else str(groups)] = await _rate(
                engine, lambda tokens, times, e=engine: emulated.stream(e, tokens, times), streams, wanted, seconds
            )
    fixed = {groups: rate["tokens_per_second"] for groups, rate in rates.items() if groups != "chosen"}
    chosen = rates["chosen"]["tokens_per_second"]
    return {
        "shape": name,
        "stages": stages,
        "chosen_groups": rates["chosen"]["groups"],
        "tokens_per_second": chosen,
        "fixed": fixed,
        "of_best_fixed": round(chosen / max(fixed.values()), 4),
        "of_one_group": round(chosen / fixed["1"], 4),
    }


# -- long prompts ------------------------------------------------------------------------------------------


class Reports:
    """Listens to an engine's reports: what each chunk took on each stage."""

    def __init__(self, engine: PipelineEngine) -> None:
        self.chunks: dict[int, list[float]] = {}
        measure = engine._measure

        def heard(trip: Any, report: Report, everybody: bool) -> None:
            if trip.microbatch.kind is Kind.PREFILL:
                self.chunks.setdefault(report.microbatch_id, []).append(report.compute_seconds)
            measure(trip, report, everybody)

        engine._measure = heard  # type: ignore[method-assign]


def prefill_stages(stages: int, step_seconds: float) -> list[EmulationSpec]:
    return [
        EmulationSpec(
            seconds_per_step=CHUNK_SECONDS,
            seconds_per_row=(step_seconds - CHUNK_SECONDS) / 2,  # two rows in a group
            seconds_per_prompt_token=TOKEN_SECONDS,
            seconds_per_prompt_square=SQUARE_SECONDS,
        )
    ] * stages


async def ttft(prompt: int, stages: int) -> dict[str, Any]:
    async with emulated.pipeline(prefill_stages(stages, 0.01)) as engine:
        for warm in (200, 700, 2_500):  # what its chunk times are measured from
            await emulated.stream(engine, 1, [], prompt=warm)
        reports = Reports(engine)
        began, times = time.perf_counter(), list[float]()
        await emulated.stream(engine, 1, times, prompt=prompt)
    total = sum(sum(seconds) for seconds in reports.chunks.values())
    chunks = len(reports.chunks)
    formula = total / stages * (1 + (stages - 1) / chunks)
    measured = times[0] - began
    return {
        "prompt": prompt,
        "stages": stages,
        "chunks": chunks,
        "ttft_ms": round(1000 * measured, 1),
        "formula_ms": round(1000 * formula, 1),
        "of_formula": round(measured / formula, 4),
    }


async def itl(stages: int, budget_ms: float) -> dict[str, Any]:
    settings = SchedulerSection(itl_budget_ms=budget_ms)
    async with emulated.pipeline(prefill_stages(stages, 0.01), settings) as engine:
        for warm in (200, 700, 2_500):
            await emulated.stream(engine, 1, [], prompt=warm)
        each: list[list[float]] = [[] for _ in range(2 * stages)]
        tasks = [asyncio.create_task(emulated.stream(engine, 20_000, times)) for times in each]
        while min(map(len, each)) < 40:
            await asyncio.sleep(0.02)
        reports, groups = Reports(engine), engine.statistics()["groups"]
        began, first = time.perf_counter(), list[float]()
        await emulated.stream(engine, 1, first, prompt=LONG_PROMPT)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        step = engine._fill.step_seconds(2) or 0.0
    gaps = sorted(b - a for times in each for a, b in itertools.pairwise(times) if a >= began and b <= first[0])
    chunk = max(max(seconds) for seconds in reports.chunks.values())
    formula = max(groups * step + chunk, (stages - 1) * chunk + step)
    p99 = gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
    return {
        "stages": stages,
        "budget_ms": budget_ms,
        "groups": groups,
        "chunks": len(reports.chunks),
        "longest_chunk_ms": round(1000 * chunk, 1),
        "ttft_ms": round(1000 * (first[0] - began), 1),
        "itl_p50_ms": round(1000 * statistics.median(gaps), 1),
        "itl_p99_ms": round(1000 * p99, 1),
        "formula_ms": round(1000 * formula, 1),
        "of_formula": round(p99 / formula, 4),
    }


# -- the program -----------------------------------------------------------------------------------------


def _middle(runs: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    return sorted(runs, key=lambda run: run[key])[len(runs) // 2]


def run_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for step, stages in itertools.product(arguments.step_ms, arguments.stages):
        slow_last = 1.5 if arguments.unequal else 1.0
        case = Case(stages, step / 1000, arguments.burn_ms / 1000, slow_last, arguments.gateway)
        runs = [asyncio.run(steps(case, arguments.seconds)) for _ in range(arguments.repeat)]
        middle = _middle(runs, "efficiency")
        print(
            f"EMULATION  {stages} stages  t(b) = {step:g} ms · b/4  {middle['tokens_per_second']:8.1f} tok/s "
            f"of {middle['bound']:.1f} = {middle['efficiency']:.1%}   groups {middle['groups']}   "
            f"busy {min(middle['busy']):.1%} to {max(middle['busy']):.1%}   +{middle['added_ms_per_hop']:.2f} ms a hop"
            f"{'   through the gateway' if case.gateway else ''}",
            flush=True,
        )
        results.append({"scenario": "steps", **middle, "runs": runs})
    return results


def run_shapes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for stages in arguments.stages:
        for name in arguments.shape:
            result = asyncio.run(shape(name, stages, arguments.seconds))
            print(
                f"EMULATION  {stages} stages  {name:7} {result['tokens_per_second']:8.1f} tok/s with "
                f"{result['chosen_groups']} groups = {result['of_best_fixed']:.1%} of the best fixed number, "
                f"{result['of_one_group']:.2f} × one group",
                flush=True,
            )
            results.append({"scenario": "shapes", **result})
    return results


def run_ttft(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for stages, prompt in itertools.product(arguments.stages, PROMPTS):
        result = _middle([asyncio.run(ttft(prompt, stages)) for _ in range(arguments.repeat)], "of_formula")
        print(
            f"EMULATION  {stages} stages  prompt {prompt:6} in {result['chunks']} chunks: first token after "
            f"{result['ttft_ms']:.0f} ms, formula {result['formula_ms']:.0f} ms = {result['of_formula']:.3f}",
            flush=True,
        )
        results.append({"scenario": "ttft", **result})
    return results


def run_itl(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for stages in arguments.stages:
        runs = [asyncio.run(itl(stages, arguments.itl_budget_ms)) for _ in range(arguments.repeat)]
        result = _middle(runs, "of_formula")
        print(
            f"EMULATION  {stages} stages  {LONG_PROMPT} tokens beside {2 * stages} streams: p99 "
            f"{result['itl_p99_ms']:.1f} ms, formula {result['formula_ms']:.1f} ms = {result['of_formula']:.3f}   "
            f"(chunks of {result['longest_chunk_ms']:.0f} ms, first token after {result['ttft_ms']:.0f} ms)",
            flush=True,
        )
        results.append({"scenario": "itl", **result, "runs": runs})
    return results


SCENARIOS = {"steps": run_steps, "shapes": run_shapes, "ttft": run_ttft, "itl": run_itl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["steps"])
    parser.add_argument("--shape", nargs="+", choices=tuple(shapes(1)), default=list(shapes(1)), help="of ``shapes``")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0, 5.0])
    parser.add_argument("--burn-ms", type=float, default=0.0)
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--gateway", action="store_true", help="read the streams over HTTP")
    parser.add_argument("--itl-budget-ms", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    log.configure("error")
    results = [result for name in arguments.scenario for result in SCENARIOS[name](arguments)]
    record.save(arguments.json, "fill", results)


if __name__ == "__main__":
    main()
