"""The scheduler over real slices on little memory: who was preempted says what it says alone, and nothing overflows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from mlx_cluster.engine.memory import StageMemory
from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Ended, Failed, Policy
from mlx_cluster.microbatch import Frame, Microbatch, Report
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Grammar, Sampling, SequenceRequest
from tests.tiny_models import write_tiny_model

BLOCKS = 9  # of 256 positions, where three rows of two blocks and a copy of them are twelve


class Pipeline:
    """Slices in this process. Headers leave as the scheduler says, several ahead of the reports, as in a real one."""

    def __init__(self, runners: Sequence[SliceRunner], blocks: int | None) -> None:
        self.runners = runners
        memory = tuple(
            StageMemory(blocks * 256 * r.kv_bytes_per_position if blocks else None, r.kv_bytes_per_position, 0)
            for r in runners
        )
        index = PrefixIndex(Limits(1 << 20, 100, min_tokens=16))
        policy = Policy(len(runners), 8, 100, 64, lambda rows: min(rows, 2), 4, memory=memory)
        self.scheduler = Scheduler(policy, index)
        self.budget = blocks
        self.peak_bytes = [0] * len(runners)

    def run(self, requests: Sequence[SequenceRequest], *, preempt_every: int = 0) -> list[list[int]]:
        """What each says. ``preempt_every`` so many reports a row is preempted though there is room for all."""
        said: dict[int, list[int]] = {self.scheduler.submit(request): [] for request in requests}
        ended = reports = 0
        in_flight: deque[Report] = deque()
        while True:
            while (header := self.scheduler.next()) is not None:
                in_flight.append(self._through(header))
            self.scheduler.audit()
            if not in_flight:
                break
            for effect in self.scheduler.complete(in_flight.popleft()):
                assert not isinstance(effect, Failed), effect
                if isinstance(effect, Drew):
                    assert effect.token.index == len(said[effect.sequence])
                    said[effect.sequence].append(effect.token.token_id)
                ended += isinstance(effect, Ended)
            reports += 1
            if preempt_every and reports % preempt_every == 0 and self.scheduler.statistics()["rows"] > 1:
                assert self.scheduler._preempt_youngest()
        assert self.scheduler.idle
        assert ended == len(requests)
        assert all(runner.num_rows == 0 for runner in self.runners)
        return list(said.values())

    def _through(self, header: Microbatch) -> Report:
        frame: Frame | None = None
        for stage, runner in enumerate(self.runners):
            outcome = runner.submit(header, frame).wait()
            frame = outcome.frame
            self.peak_bytes[stage] = max(self.peak_bytes[stage], runner.cache_bytes)
        assert not outcome.missing
        return Report(header.id, len(self.runners) - 1, sampled=outcome.sampled, failed=outcome.failed)


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> list[SliceRunner]:
    path: Path = write_tiny_model(tmp_path_factory.mktemp("m") / "tiny", layers=2, width=32, vocab=300)
    return [SliceRunner.load(path, 0, 1, device="cpu"), SliceRunner.load(path, 1, 2, device="cpu")]


def requests() -> list[SequenceRequest]:
    rng = Random(11)
    samplings = (
        Sampling(temperature=0.0),
        Sampling(temperature=0.7, seed=5, top_k=9),
        Sampling(temperature=0.6, seed=2, repetition_penalty=1.1, presence_penalty=0.3),
    )
    made = []
    for number in range(7):
        prompt = tuple(rng.randrange(3, 256) for _ in range(rng.choice([30, 240, 250])))
        made.append(SequenceRequest(f"r{number}", "m", prompt, rng.choice([10, 20, 30]), samplings[number % 3]))
    return made


def test_tokens_are_those_of_a_solo_run_and_memory_stays_within_the_budget(runners: list[SliceRunner]) -> None:
    wanted = requests()
    alone = [Pipeline(runners, None).run([request])[0] for request in wanted]
    tight = Pipeline(runners, BLOCKS)
    assert tight.run(wanted) == alone
    assert tight.scheduler.statistics()["preemptions"] > 0
    for runner, peak in zip(runners, tight.peak_bytes, strict=True):
        assert peak <= BLOCKS * 256 * runner.kv_bytes_per_position


def test_a_grammar_goes_on_where_it_was(runners: list[SliceRunner]) -> None:
    grammar = Grammar("regex", "[a-c]{90}")
    wanted = [
        SequenceRequest(f"g{n}", "m", tuple(range(5, 45)), 25, Sampling(temperature=1.0, seed=n), grammar=grammar)
        for n in range(3)
    ]
    alone = [Pipeline(runners, None).run([request])[0] for request in wanted]
    assert Pipeline(runners, None).run(wanted, preempt_every=9) == alone
