"""What drafts win and cost for a single stream: tokens a second with and without, and the same tokens each time.

    python benchmarks/speculation.py --json speculation.json

Three cases, each with real stage processes, gRPC links, scheduler and engine. Repetitions with and without alternate;
printed are the medians of tokens a second behind the first token, and their quotient.

(a) passage: the demo model over two real stages recites answers that its conversation has already.
(b) emulated: three stages that sleep instead of computing (no figure is a model's speed), a text that repeats itself;
    a step takes ``--step-ms``, and each position of a block ``--position-ms`` more, on every stage.
(c) unrelated: the demo model over two real stages at a temperature where it says nothing twice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record
from mlx_cluster import demo
from mlx_cluster.config.schema import RuntimeSection, SchedulerSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.engine.speculation import Bounds
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.request import Sampling, SequenceRequest, Token
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import EmulationSpec, LinkCommand, StageSpec
from mlx_cluster.tokenizer import tokenizer as tokenizers

EPOCH = Epoch(1, 1)
NUM_LAYERS = 28  # of the demo model
REPEAT_AFTER = 24  # tokens of the emulated text
UNRELATED_TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True)
class Case:
    """``requests`` are run one after the other; each is one stream."""

    name: str
    stages: int
    requests: tuple[SequenceRequest, ...]
    emulation: EmulationSpec | None = None


@contextlib.asynccontextmanager
async def pipeline(case: Case, bounds: Bounds) -> AsyncIterator[PipelineEngine]:
    layers = NUM_LAYERS if case.emulation is None else case.stages
    cuts = [round(layers * index / case.stages) for index in range(case.stages + 1)]
    assignments = tuple(StageAssignment(i, i, *cut) for i, cut in enumerate(itertools.pairwise(cuts)))
    directory = "" if case.emulation is not None else str(demo.model_dir())
    plan = Plan("speculation", 1, ModelRef("demo", "none", layers), assignments, "grpc")
    async with contextlib.AsyncExitStack() as stack:
        processes = []
        for index in range(case.stages):
            spec = StageSpec(plan, index, EPOCH, directory, "127.0.0.1", 0, emulation=case.emulation)
            process = await StageProcess.start(spec, RuntimeSection())
            stack.push_async_callback(process.stop)
            processes.append(process)
        addresses = tuple([(await process.loaded()).address for process in processes])
        await asyncio.gather(*(process.link(LinkCommand("grpc", addresses)) for process in processes))
        engine = PipelineEngine(
            plan,
            EPOCH,
            addresses,
            SchedulerSection(),
            max_context=100_000,
            report_deadline_seconds=60,
            drafts=bounds,
        )
        stack.push_async_callback(engine.stop)
        await engine.start(60)
        await engine.canary(60)
        await engine.rehearsed()
        yield engine


async def stream(engine: PipelineEngine, request: SequenceRequest) -> tuple[list[int], float]:
    """The tokens, and the seconds from the first to the last of them."""
    tokens: list[int] = []
    first = last = 0.0
    async for event in engine.generate(request):
        if isinstance(event, Token):
            last = time.perf_counter()
            first = first or last
            tokens.append(event.token_id)
    return tokens, last - first


async def run(case: Case, bounds: Bounds, repeat: int) -> dict[str, Any]:
    """Every request with and without, in turns, in one pipeline."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    async with pipeline(case, bounds) as engine:
        await stream(engine, replace(case.requests[0], speculate=True))  # what a new shape compiles is no part of it
        before = engine.statistics()
        for _ in range(repeat):
            said: dict[bool, list[list[int]]] = {}
            for wish in (True, False):
                runs = [
                    await stream(engine, replace(each, speculate=None if wish else False)) for each in case.requests
                ]
                said[wish] = [tokens for tokens, _ in runs]
                rates[wish].append(sum(len(tokens) - 1 for tokens, _ in runs) / sum(seconds for _, seconds in runs))
            if said[True] != said[False]:
                raise SystemExit(f"{case.name}: drafts changed the tokens")
        after = engine.statistics()
    on, off = statistics.median(rates[True]), statistics.median(rates[False])
    figures = {key: after[key] - before[key] for key in ("drafted_tokens", "accepted_tokens", "verified_blocks")}
    return {
        "case": case.name,
        "stages": case.stages,
        "emulated": case.emulation is not None,
        "tokens": sum(map(len, said[True])),
        "tokens_per_second_on": round(on, 2),
        "tokens_per_second_off": round(off, 2),
        "quotient": round(on / off, 3),
        "quotients": [round(a / b, 3) for a, b in zip(rates[True], rates[False], strict=True)],
        **figures,
    }


def cases(step_seconds: float, position_seconds: float, tokens: int) -> Sequence[Case]:
    tokenizer = tokenizers.load(demo.model_dir())
    examples = json.loads((Path(demo.__file__).parent / "corpus" / "examples.json").read_text())[:6]
    history = [
        {"role": role, "content": example[field]}
        for example in examples
        for role, field in (("user", "question"), ("assistant", "answer"))
    ]
    again = tuple(
        SequenceRequest(
            "passage",
            "demo",
            tokenizer.render_chat([*history, {"role": "user", "content": example["question"]}]),
            120,
            Sampling(temperature=0.0),
            stop_token_ids=tokenizer.eos_token_ids,
        )
        for example in examples
    )
    anything = Sampling(temperature=UNRELATED_TEMPERATURE, seed=5)
    unrelated = SequenceRequest("unrelated", "demo", tokenizer.encode("Nothing of this is said"), tokens, anything)
    emulation = EmulationSpec(
        seconds_per_step=step_seconds - position_seconds,
        seconds_per_row=position_seconds,
        seconds_per_prompt_token=position_seconds,
        repeat_after=REPEAT_AFTER,
    )
    scripted = SequenceRequest("scripted", "demo", (1, 2, 3, 4), tokens, Sampling(temperature=0.0))
    return (
        Case("passage", 2, again),
        Case("emulated", 3, (scripted,), emulation),
        Case("unrelated", 2, (unrelated,)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["passage", "emulated", "unrelated"])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=300, help="of the emulated and the unrelated text")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--position-ms", type=float, default=1.0)
    parser.add_argument("--max-draft", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for case in cases(arguments.step_ms / 1000, arguments.position_ms / 1000, arguments.tokens):
        if case.name not in arguments.cases:
            continue
        result = asyncio.run(run(case, Bounds("auto", arguments.max_draft), arguments.repeat))
        print(
            f"{'EMULATION  ' if result['emulated'] else ''}{case.name}  {case.stages} stages  "
            f"{result['tokens_per_second_off']:.1f} → {result['tokens_per_second_on']:.1f} tok/s = "
            f"{result['quotient']:.2f}×   {result['accepted_tokens']} of {result['drafted_tokens']} drafted tokens "
            f"came true in {result['verified_blocks']} blocks",
            flush=True,
        )
        results.append(result)
    record.save(arguments.json, "speculation", results)


if __name__ == "__main__":
    main()
