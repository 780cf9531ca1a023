"""Hammer: hundreds of interleaved requests over prompts that begin alike, on real slices whose memory is too small.

Rows are preempted and computed again, prefix entries come, serve and go, clients leave in the middle; and whatever was
said to anybody equals what it is told when it is alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import pytest

from mlx_cluster.engine.memory import StageMemory
from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Effect, Ended, Policy
from mlx_cluster.engine.waiting import Share
from mlx_cluster.microbatch import Microbatch, Report
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Sampling, SequenceRequest
from tests.tiny_models import write_tiny_model

VOCAB = 300
NUM_REQUESTS = 500
STAGES = 2
MAX_ROWS = 8
# Beginnings as long as a block of cache, so that rows grow into their next one while they decode.
BEGINNINGS = {
    name: tuple(Random(name).randrange(VOCAB) for _ in range(length)) for name, length in (("A", 224), ("B", 64))
}
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, seed=11, top_k=20),
    Sampling(temperature=0.6, seed=5, top_p=0.9, frequency_penalty=0.3),
)


@dataclass
class Pipeline:
    """Slices in this process. Reports come back as late as the credits allow, so that decisions overlap."""

    runners: Sequence[SliceRunner]
    scheduler: Scheduler
    on_the_way: deque[Report] = field(default_factory=deque)
    said: dict[int, list[int]] = field(default_factory=dict)
    ended: Counter[int] = field(default_factory=Counter)

    def submit(self, request: SequenceRequest) -> int:
        sequence = self.scheduler.submit(request)
        self.said[sequence] = []
        return sequence

    def step(self) -> bool:
        """Send whatever may go, hear the oldest report; False when there is nothing to do."""
        while (microbatch := self.scheduler.next()) is not None:
            self.on_the_way.append(self._through(microbatch))
        self._hear(self.scheduler.take_effects())
        if not self.on_the_way:
            return False
        self._hear(self.scheduler.complete(self.on_the_way.popleft()))
        self.scheduler.audit()
        return True

    def _through(self, microbatch: Microbatch) -> Report:
        frame = None
        for runner in self.runners:
            outcome = runner.submit(microbatch, frame).wait()
            frame = outcome.frame
            assert not outcome.failed
            assert not outcome.missing
        return Report(microbatch.id, len(self.runners) - 1, sampled=outcome.sampled)

    def _hear(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Drew(sequence, token):
                    assert token.index == len(self.said[sequence])
                    self.said[sequence].append(token.token_id)
                case Ended(sequence):
                    self.ended[sequence] += 1


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> list[SliceRunner]:
    path: Path = tmp_path_factory.mktemp("hammer") / "tiny"
    write_tiny_model(path, layers=4, width=32, vocab=VOCAB, family="qwen2/untied")
    return [SliceRunner.load(path, start, start + 2, device="cpu") for start in (0, 2)]


def request_of(kind: int) -> SequenceRequest:
    """One of a few dozen different requests; they share beginnings, and some continue what others began."""
    dice = Random(kind)
    beginning = BEGINNINGS[dice.choice("AAB")]
    shared = tuple(Random(kind % 7).randrange(VOCAB) for _ in range(dice.randrange(0, 40)))
    own = (kind, *(dice.randrange(VOCAB) for _ in range(dice.randrange(1, 12))))
    return SequenceRequest(
        str(kind),
        "m",
        beginning + shared + own,
        dice.randrange(2, 24),
        dice.choice(SAMPLINGS),
        tenant=dice.choice(("", "a")),
        priority=dice.choice((0, 0, 1)),
    )


def test_five_hundred_interleaved_requests_say_what_they_say_alone(runners: list[SliceRunner]) -> None:
    policy = Policy(STAGES, MAX_ROWS, NUM_REQUESTS, 64, lambda rows: min(rows, STAGES), 4)

    @cache
    def alone(kind: int) -> list[int]:
        solo = Pipeline(runners, Scheduler(policy))
        sequence = solo.submit(request_of(kind))
        while solo.step():
            pass
        return solo.said[sequence]

    budget = 9 * 256 * max(runner.kv_bytes_per_position for runner in runners)
    memory = tuple(StageMemory(budget, runner.kv_bytes_per_position, runner.kv_fixed_bytes) for runner in runners)
    per_position = max(runner.kv_bytes_per_position for runner in runners)
    index = PrefixIndex(Limits(1500 * per_position, per_position, can_trim=all(r.can_trim for r in runners)))
    tight = Policy(
        STAGES, MAX_ROWS, NUM_REQUESTS, 64, policy.num_groups, 4, shares={"a": Share(weight=2.0)}, memory=memory
    )
    pipeline = Pipeline(runners, Scheduler(tight, index))
    dice = Random(1)
    kinds = [dice.randrange(48) for _ in range(NUM_REQUESTS)]
    waiting, kind_of, cancelled = deque(kinds), dict[int, int](), set[int]()
    while waiting or not pipeline.scheduler.idle:
        for _ in range(dice.randrange(3)):
            if waiting:
                kind = waiting.popleft()
                kind_of[pipeline.submit(request_of(kind))] = kind
        if dice.random() < 0.02 and kind_of:
            leaves = dice.choice([s for s in kind_of if not pipeline.ended[s]] or [0])
            if not pipeline.ended[leaves]:
                pipeline.scheduler.cancel(leaves)
                cancelled.add(leaves)
        pipeline.step()

    figures = pipeline.scheduler.statistics()
    assert len(kind_of) == NUM_REQUESTS
    assert all(pipeline.ended[sequence] == (sequence not in cancelled) for sequence in kind_of)
    for sequence, kind in kind_of.items():
        said, expected = pipeline.said[sequence], alone(kind)
        assert said == (expected[: len(said)] if sequence in cancelled else expected), (
            f"request {sequence}, kind {kind}"
        )
    # It was as hard as it should be.
    assert figures["preemptions"] >= 5
    assert figures["prefix_hits"] >= 100
    assert figures["prefix_evictions"] >= 20
    assert len(cancelled) >= 5
    # And nothing is left.
    assert all(runner.held().rows == 0 for runner in runners)
    assert all(runner.held().entries == figures["prefix_entries"] for runner in runners)
    assert (figures["waiting"], figures["rows"], figures["in_flight"]) == (0, 0, 0)
