"""A small model's drafts: its rows always hold a beginning of what they were told to, however late everything comes."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.draft_model import CHUNK, MAX_ROWS, DraftModel
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Policy
from mlx_cluster.engine.speculation import BlockCosts, Bounds, Speculation
from mlx_cluster.microbatch import FailedRow, Kind, Microbatch, Report, Sampled
from mlx_cluster.request import Sampling, SequenceRequest
from tests.simulated_pipeline import SimulatedPipeline


def next_token(text: list[int]) -> int:
    """What the small model says behind a text."""
    return random.Random(1009 * len(text) + text[-1]).randrange(50)


def greedy(text: list[int], count: int) -> tuple[int, ...]:
    text = list(text)
    for _ in range(count):
        text.append(next_token(text))
    return tuple(text[len(text) - count :])


@dataclass
class Process:
    """A stage process with the whole small model: does what headers say when it is told to, and checks them."""

    headers: deque[Microbatch] = field(default_factory=deque)
    contents: dict[int, list[int]] = field(default_factory=dict)
    model: DraftModel = field(init=False)
    max_chunk: int = 0

    def __post_init__(self) -> None:
        self.model = DraftModel(self.headers.append, max_ahead=6)

    def step(self, *, fail: bool = False) -> bool:
        """Carry out one header and report it."""
        if not self.headers:
            return False
        header = self.headers.popleft()
        for trim in header.trim:
            assert 0 < trim.length < len(self.contents[trim.row])
            del self.contents[trim.row][trim.length :]
        for row in header.release:
            del self.contents[row]
        for spec in header.admit:
            assert spec.row not in self.contents
            self.contents[spec.row] = []
        sampled = []
        for row, tokens in zip(header.rows, header.row_tokens(), strict=True):
            self.contents[row] += tokens
            assert header.kind is Kind.PREFILL or len(tokens) == 1
            self.max_chunk = max(self.max_chunk, len(tokens))
            if header.sample:
                sampled.append(Sampled(row, next_token(self.contents[row])))
        failed = tuple(FailedRow(row, "no memory") for row in header.rows) if fail else ()
        self.model.on_report(Report(header.id, 0, sampled=() if fail else tuple(sampled), failed=failed))
        return True

    def settle(self) -> None:
        while self.step():
            pass


def test_it_reads_a_long_text_in_chunks_and_goes_on_by_itself() -> None:
    process = Process()
    prompt = [at % 7 for at in range(2 * CHUNK + 9)]
    process.model.follow(0, prompt, [], 4)
    assert not process.model.is_close(0, 4)
    assert process.model.draft(0, 4) == ()
    process.settle()
    assert process.model.draft(0, 4) == greedy(prompt, 4)
    assert process.max_chunk == CHUNK


def test_what_was_right_is_not_computed_again() -> None:
    process = Process()
    process.model.follow(0, [1, 2, 3], [], 4)
    process.settle()
    expected = greedy([1, 2, 3], 12)
    for said in (2, 5, 7):
        process.model.follow(0, [1, 2, 3], expected[:said], 4)
        process.settle()
        assert process.model.draft(0, 4) == expected[said : said + 4]
    assert process.contents[0] == [1, 2, 3, *expected[:10]]


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    events=st.lists(
        st.one_of(st.just("step"), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=5)),
        max_size=40,
    ),
)
def test_however_late_its_answers_come_a_draft_continues_the_text(
    prompt: list[int], events: list[str | list[tuple[bool, int]]]
) -> None:
    """The large model says what the small one would, or something else, while headers are on their way."""
    process, output = Process(), []
    process.model.follow(0, prompt, output, 4)
    for event in events:
        if isinstance(event, str):
            process.step()
        else:
            for agrees, token in event:
                output.append(next_token([*prompt, *output]) if agrees else token)
            process.model.follow(0, prompt, output, 4)
        draft = process.model.draft(0, 4)
        assert draft == greedy([*prompt, *output], len(draft))
        assert sum(1 for header in process.headers if header.rows) <= 1
    process.settle()
    assert process.model.draft(0, 4) == greedy([*prompt, *output], 4)
    assert not process.model.is_close(0, 4)
    process.model.forget(0)
    process.settle()
    assert process.contents == {}


def test_rows_are_bounded_and_released() -> None:
    process = Process()
    for sequence in range(MAX_ROWS + 2):
        process.model.follow(sequence, [1, 2], [], 2)
    process.step()
    assert process.model.draft(MAX_ROWS, 2) == ()
    for sequence in range(MAX_ROWS + 2):
        process.model.forget(sequence)
    process.settle()
    assert process.contents == {}
    process.model.follow(99, [1, 2], [], 2)
    process.settle()
    assert process.model.draft(99, 2) == greedy([1, 2], 2)


def test_a_row_that_fails_drafts_no_more() -> None:
    process = Process()
    process.model.follow(0, [1, 2], [], 2)
    process.step(fail=True)
    process.model.follow(0, [1, 2], [3], 2)
    assert not process.headers
    assert process.model.draft(0, 2) == ()
    assert not process.model.is_close(0, 2)


@pytest.mark.parametrize("agrees_until", [0, 40, 10**9])
@pytest.mark.parametrize("wait_seconds", [0.0, 0.5])
def test_a_step_waits_a_moment_for_a_draft_and_says_the_same(agrees_until: int, wait_seconds: float) -> None:
    """The small model answers four times faster than a step; the large one agrees for so many tokens."""
    prompt = (1, 2, 3)
    text = list(prompt)

    def script(_row: int, index: int) -> int:
        while len(text) <= len(prompt) + index:
            right = next_token(text)
            text.append(right if len(text) < agrees_until else (right + 1) % 50)
        return text[len(prompt) + index]

    def run(with_model: bool) -> tuple[SimulatedPipeline, float]:
        process = Process()
        costs = BlockCosts(2, lambda: 0.0)
        # So long a match never comes, so that all drafts are the model's.
        bounds = Bounds("auto", 4, 16, wait_seconds=wait_seconds)
        speculation = Speculation(bounds, costs, process.model if with_model else None)
        policy = Policy(2, 4, 10, 64, lambda rows: rows)
        pipeline = SimulatedPipeline(
            Scheduler(policy, None, speculation),
            [lambda m: 0.5 + 0.01 * len(m.tokens)] * 2,
            script=script,
            on_stage_report=lambda stage, m, seconds: (
                costs.observe(stage, len(m.tokens), seconds) if m.kind is not Kind.PREFILL else None
            ),
        )
        pipeline.submit(SequenceRequest("r", "m", prompt, 120, Sampling()))
        while not pipeline.scheduler.idle:
            at = pipeline.now
            wakes_at = pipeline.scheduler.wakes_at
            if wakes_at is not None and process.headers:
                pipeline.now += 0.125  # the time of a step of the small model
                process.step()
                pipeline.pump()
            elif not pipeline.step():
                assert wakes_at is not None, "nothing is under way"
                pipeline.now = max(pipeline.now, wakes_at)
                pipeline.pump()
            else:
                for _ in range(int((pipeline.now - at) / 0.125)):
                    process.step()
                pipeline.pump()
        return pipeline, pipeline.now

    plain, plain_seconds = run(False)
    drafted, drafted_seconds = run(True)

    def tokens(pipeline: SimulatedPipeline) -> list[object]:
        return [effect for _, effect in pipeline.effects]

    assert tokens(plain) == tokens(drafted)
    assert drafted_seconds < 1.08 * plain_seconds
    if agrees_until > 200:
        assert plain_seconds / drafted_seconds > 1.5
