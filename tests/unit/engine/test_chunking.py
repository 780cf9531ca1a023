"""Prompts in chunks: all stages at work, streams that keep their pace, nobody stuck behind 100k tokens."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from mlx_cluster.engine.chunking import ChunkTimes, Pace, considerate_length, in_equal_pieces
from mlx_cluster.engine.fill import Fill
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Policy
from mlx_cluster.microbatch import Kind, Microbatch
from mlx_cluster.request import Sampling, SequenceRequest
from tests.simulated_pipeline import Chunks, SimulatedPipeline, StageTime

PER_TOKEN, PER_CHUNK, PER_SQUARE = 0.0004, 0.006, 8e-9
STEP = 0.01


class Stages:
    """Times as real ones go: steps flat in rows, chunks slower the longer the prompt; it knows each row's position."""

    def __init__(self, slow_last: float = 1.0) -> None:
        self.slow_last = slow_last
        self._at: dict[tuple[int, int], int] = defaultdict(int)
        self._told: dict[tuple[int, int], float] = {}

    def time(self, stage: int, last: int) -> StageTime:
        def seconds(microbatch: Microbatch) -> float:
            factor = self.slow_last if stage == last else 1.0
            if microbatch.kind is Kind.DECODE:
                return factor * STEP
            key = (stage, microbatch.id)
            if key not in self._told:
                total = PER_CHUNK
                longest = microbatch.batch_shape[1]
                for row in microbatch.rows:
                    position = self._at[(stage, row)]
                    self._at[(stage, row)] += longest
                    total += PER_TOKEN * longest + PER_SQUARE * longest * (longest + 2 * position)
                self._told[key] = factor * total
            return self._told[key]

        return seconds


def pipeline(stages: int, *, budget: float = 0.2, chunk: int = 512, slow_last: float = 1.0) -> SimulatedPipeline:
    fill, times, machine = Fill(stages), ChunkTimes(stages), Stages(slow_last)
    policy = Policy(
        num_stages=stages,
        max_rows=64,
        max_queue=100,
        prefill_chunk=chunk,
        num_groups=fill.num_groups,
        max_prompts=8,
        step_seconds=fill.step_seconds,
        chunk_times=times,
        itl_budget_seconds=budget,
    )

    def measure(stage: int, microbatch: Microbatch, chunks: Chunks, seconds: float) -> None:
        if microbatch.kind is Kind.DECODE:
            fill.observe(stage, len(microbatch.rows), seconds)
        else:
            times.observe(stage, chunks, seconds)

    stage_times = [machine.time(stage, stages - 1) for stage in range(stages)]
    return SimulatedPipeline(Scheduler(policy), stage_times, hop=0.0005, measure=measure, check=False)


def request(prompt: int, tokens: int = 1) -> SequenceRequest:
    return SequenceRequest("r", "m", (7,) * prompt, tokens, Sampling())


def token_times(simulated: SimulatedPipeline) -> dict[int, list[float]]:
    times: dict[int, list[float]] = defaultdict(list)
    for at, effect in simulated.effects:
        if isinstance(effect, Drew):
            times[effect.sequence].append(at)
    return times


def chunks_since(simulated: SimulatedPipeline, since: int) -> list[Microbatch]:
    return [m for _, m in simulated.sent[since:] if m.kind is Kind.PREFILL]


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("prompt", [1_000, 4_000, 16_000, 60_000])
def test_alone_a_long_prompt_overlaps_on_all_stages(stages: int, prompt: int) -> None:
    simulated = pipeline(stages)
    simulated.submit(request(2_000))  # the first one is what the measurements come from
    simulated.run()
    before, busy, began = len(simulated.sent), sum(simulated.busy), simulated.now
    sequence = simulated.submit(request(prompt))
    simulated.run()
    chunks = len(chunks_since(simulated, before))
    assert chunks >= 4
    total = sum(simulated.busy) - busy
    ttft = token_times(simulated)[sequence][0] - began
    assert ttft <= 1.15 * total / stages * (1 + (stages - 1) / chunks) + stages * 0.0005


def test_chunks_take_equal_time_as_a_prompt_gets_slower() -> None:
    simulated = pipeline(3, chunk=2048)
    for prompt in (300, 1_000, 8_000):
        simulated.submit(request(prompt))
        simulated.run()
    before = len(simulated.sent)
    simulated.submit(request(60_000))
    simulated.run()
    chunks = chunks_since(simulated, before)
    lengths = [len(m.tokens) for m in chunks]
    assert lengths[0] > 1.5 * lengths[-5]
    seconds = [simulated.stage_times[0](m) for m in chunks]
    assert max(seconds[:-4]) < 1.2 * min(seconds[:-4]), "the last ones share what is left"


@pytest.mark.parametrize(("stages", "budget"), [(2, 0.2), (3, 0.2), (4, 0.1), (8, 0.3), (3, 0.06)])
def test_streams_keep_their_pace_while_16k_tokens_are_computed(stages: int, budget: float) -> None:
    simulated = pipeline(stages, budget=budget)
    simulated.submit(request(4_000))
    simulated.run()
    streams = [simulated.submit(request(4, 4_000)) for _ in range(2 * stages)]
    while any(len(token_times(simulated)[stream]) < 30 for stream in streams):
        simulated.step()
    before, began = len(simulated.sent), simulated.now
    long = simulated.submit(request(16_000))
    while long not in token_times(simulated):
        simulated.step()
    ended = simulated.now
    chunk_seconds = max(simulated.stage_times[0](m) for m in chunks_since(simulated, before))
    groups = simulated.scheduler.statistics()["groups"]
    formula = max(groups * STEP + chunk_seconds, (stages - 1) * chunk_seconds + STEP)
    times = token_times(simulated)
    gaps = sorted(
        b - a for stream in streams for a, b in itertools.pairwise(times[stream]) if a >= began and b <= ended
    )
    p99 = gaps[int(0.99 * len(gaps))]
    assert p99 <= 1.1 * formula + 2 * stages * 0.0005
    assert p99 <= 1.1 * max(budget, 2 * groups * STEP)


def test_a_short_prompt_does_not_wait_for_100k_tokens_and_they_end_all_the_same() -> None:
    simulated = pipeline(3)
    long = simulated.submit(request(100_000))
    for _ in range(20):
        simulated.step()
    asked = simulated.now
    short = simulated.submit(request(100))
    while short not in token_times(simulated):
        simulated.step()
    assert simulated.now - asked < 12 * simulated.stage_times[0](chunks_since(simulated, 0)[0])
    assert long not in token_times(simulated)
    simulated.run()
    assert long in token_times(simulated)


def test_a_long_prompt_ends_however_many_short_ones_come() -> None:
    simulated = pipeline(3)
    long = simulated.submit(request(20_000))
    for _ in range(3_000):
        simulated.submit(request(400))
        for _ in range(2):
            simulated.step()
        if long in token_times(simulated):
            return
    raise AssertionError("it starved")


def test_without_measurements_a_cycle_gets_a_chunk() -> None:
    simulated = pipeline(3)
    simulated.measure = None
    for _ in range(4):
        simulated.submit(request(4, 400))
    for _ in range(30):
        simulated.step()
    before = len(simulated.sent)
    simulated.submit(request(3_000))
    for _ in range(40):
        simulated.step()
    kinds = [m.kind for _, m in simulated.sent[before:]]
    assert kinds.count(Kind.PREFILL) >= 3
    assert kinds.count(Kind.DECODE) >= 3 * (kinds.count(Kind.PREFILL) - 1)


def test_chunks_of_a_run_grow_to_what_the_budget_allows() -> None:
    times = ChunkTimes(3)
    for length in (32, 64, 128, 256):
        for stage in range(3):
            times.observe(stage, [(0, length)], 0.001 * length)
    pace = Pace(0.03, 0.01, 0.2)
    assert considerate_length(times, 3, 0, pace, 0.0) in range(60, 65)
    assert considerate_length(times, 3, 0, pace, 0.095) in range(92, 97)
    tight = Pace(0.3, 0.1, 0.2)
    assert considerate_length(times, 3, 0, tight, 0.15) == 150, "half a cycle, when the budget is none"


def test_pieces_are_equal() -> None:
    assert in_equal_pieces(100, 33) == 25
    assert in_equal_pieces(100, 50) == 50
    assert in_equal_pieces(10, 50) == 10
