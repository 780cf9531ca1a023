"""The scheduler against a simulated pipeline: everything ends, nothing is in two places, the pipeline is full."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Ended, Failed, Policy, Started
from mlx_cluster.errors import Overloaded, RowFailed
from mlx_cluster.microbatch import FailedRow, Kind, Microbatch, Report
from mlx_cluster.request import Sampling, SequenceRequest
from tests.simulated_pipeline import SimulatedPipeline, scripted_token


def request(prompt: int = 5, tokens: int = 4, **kw: object) -> SequenceRequest:
    return SequenceRequest("r", "m", tuple(range(1, prompt + 1)), tokens, Sampling(), **kw)  # type: ignore[arg-type]


def scheduler(
    stages: int = 3,
    rows: int = 16,
    queue: int = 100,
    chunk: int = 4,
    groups: int | None = None,
    prompts: int = 1,
    prefix: PrefixIndex | None = None,
) -> Scheduler:
    return Scheduler(Policy(stages, rows, queue, chunk, lambda b: min(b, groups or stages), prompts), prefix)


def prefix_index(max_bytes: int = 200, can_trim: bool = True) -> PrefixIndex:
    return PrefixIndex(Limits(max_bytes=max_bytes, bytes_per_position=1, min_tokens=2, can_trim=can_trim))


def linear(step: float, token: float) -> object:
    def seconds(microbatch: Microbatch) -> float:
        return step * len(microbatch.rows) if microbatch.kind is Kind.DECODE else token * len(microbatch.tokens)

    return seconds


def test_one_sequence_is_prefilled_in_chunks_and_decodes_to_its_length() -> None:
    pipeline = SimulatedPipeline(scheduler(chunk=4), [linear(1, 1)] * 3)  # type: ignore[list-item]
    sequence = pipeline.submit(request(prompt=10, tokens=3))
    pipeline.run()
    kinds = [(m.kind, m.batch_shape, m.sample) for _, m in pipeline.sent]
    assert kinds == [
        (Kind.PREFILL, (1, 4), False),
        (Kind.PREFILL, (1, 3), False),
        (Kind.PREFILL, (1, 3), True),
        (Kind.DECODE, (1, 1), True),
        (Kind.DECODE, (1, 1), True),
        (Kind.CONTROL, (0, 0), False),
    ]
    assert [e for _, e in pipeline.effects if isinstance(e, Ended)] == [Ended(sequence, "length", 3)]
    assert [e.token.token_id for _, e in pipeline.effects if isinstance(e, Drew)] == [
        scripted_token(0, i) for i in range(3)
    ]
    assert pipeline.scheduler.idle
    assert pipeline.known_rows == set()


def test_chunks_of_one_prompt_go_out_back_to_back_within_the_credits() -> None:
    pipeline = SimulatedPipeline(scheduler(chunk=4), [linear(1, 1)] * 3)  # type: ignore[list-item]
    pipeline.submit(request(prompt=100))
    assert len(pipeline.sent) == pipeline.scheduler.credits == 5


def test_while_something_decodes_there_is_at_most_one_chunk_per_cycle() -> None:
    pipeline = SimulatedPipeline(scheduler(chunk=2), [linear(1, 1)] * 3)  # type: ignore[list-item]
    for _ in range(6):
        pipeline.submit(request(prompt=2, tokens=200))
    for _ in range(100):
        pipeline.step()
    before = len(pipeline.sent)
    pipeline.submit(request(prompt=60, tokens=2))
    for _ in range(60):
        pipeline.step()
    kinds = [m.kind for _, m in pipeline.sent[before:]]
    chunks = [i for i, kind in enumerate(kinds) if kind is Kind.PREFILL]
    assert len(chunks) > 3
    assert all(b - a > 3 for a, b in itertools.pairwise(chunks))


def test_linear_stages_are_kept_busy() -> None:
    pipeline = SimulatedPipeline(scheduler(stages=4), [linear(1, 0.01)] * 4, check=False)  # type: ignore[list-item]
    for _ in range(16):
        pipeline.submit(request(prompt=2, tokens=100))
    pipeline.run()
    ideal = 16 * 100 * 1.0
    assert pipeline.now < ideal * 1.1
    assert all(busy > 0.9 * pipeline.now for busy in pipeline.busy)


def test_groups_are_balanced() -> None:
    pipeline = SimulatedPipeline(scheduler(stages=3), [linear(1, 1)] * 3)  # type: ignore[list-item]
    for index in range(9):
        pipeline.submit(request(prompt=1, tokens=40 if index < 6 else 5))
    sizes: dict[int, int] = {}
    late: list[int] = []
    while pipeline.step():
        for _, microbatch in pipeline.sent[-1:]:
            if microbatch.kind is Kind.DECODE:
                sizes[microbatch.group] = len(microbatch.rows)
        if pipeline.scheduler.num_decoding == 6 and not pipeline.scheduler.statistics()["prefilling"]:
            late.append(max(len(m.rows) for _, m in pipeline.sent[-3:]))
    assert late[-1] <= 2


def test_the_queue_is_bounded_and_resumed_work_goes_first_and_past_the_bound() -> None:
    s = scheduler(rows=1, queue=1)
    pipeline = SimulatedPipeline(s, [linear(1, 1)] * 3)  # type: ignore[list-item]
    first = pipeline.submit(request())
    second = pipeline.submit(request())
    with pytest.raises(Overloaded, match=r"scheduler\.max_queue is 1"):
        s.submit(request())
    resumed = pipeline.submit(request(emitted=(7, 8)))
    pipeline.run()
    started = [e.sequence for _, e in pipeline.effects if isinstance(e, Started)]
    assert started == [first, resumed, second]
    tokens = [e.token.index for _, e in pipeline.effects if isinstance(e, Drew) and e.sequence == resumed]
    assert tokens == [2, 3]


def test_a_stop_token_ends_a_sequence_and_is_delivered() -> None:
    pipeline = SimulatedPipeline(scheduler(), [linear(1, 1)] * 3)  # type: ignore[list-item]
    pipeline.submit(request(tokens=50, stop_token_ids=frozenset({scripted_token(0, 2)})))
    pipeline.run()
    assert pipeline.effects[-1][1] == Ended(0, "stop", 3)


def test_a_failed_row_ends_its_sequence_only() -> None:
    s = scheduler(stages=1, groups=1)
    first, second = s.submit(request(prompt=1)), s.submit(request(prompt=1))
    a, b = s.next(), s.next()
    assert a is not None
    assert b is not None
    s.take_effects()
    effects = s.complete(Report(a.id, 0, failed=(FailedRow(a.rows[0], "token 9 is not in the vocabulary"),)))
    assert len(effects) == 1
    assert isinstance(effects[0], Failed)
    assert effects[0].sequence == first
    assert isinstance(effects[0].error, RowFailed)
    s.audit()
    s.cancel(second)
    s.complete(Report(b.id, 0))
    last = s.next()
    assert last is not None
    assert sorted(last.release) == [a.rows[0], b.rows[0]]


def test_cancelled_sequences_leave_nothing_behind() -> None:
    pipeline = SimulatedPipeline(scheduler(rows=2), [linear(1, 1)] * 3)  # type: ignore[list-item]
    ids = [pipeline.submit(request(prompt=9, tokens=50)) for _ in range(5)]
    for count, sequence in enumerate(ids):
        for _ in range(count * 3):
            pipeline.step()
        pipeline.cancel(sequence)
    pipeline.run()
    assert pipeline.scheduler.idle
    assert pipeline.known_rows == set()


trace = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(
    trace=trace,
    stages=st.integers(1, 5),
    rows=st.integers(1, 9),
    chunk=st.integers(1, 30),
    groups=st.integers(1, 7),
    prompts=st.integers(1, 4),
    prefix=st.none() | st.builds(prefix_index, max_bytes=st.integers(10, 300), can_trim=st.booleans()),
    loses=st.sampled_from([0, 1, 3]),
)
def test_every_sequence_ends_and_the_books_balance(
    trace: list[tuple[str, int, int]],
    stages: int,
    rows: int,
    chunk: int,
    groups: int,
    prompts: int,
    prefix: PrefixIndex | None,
    loses: int,
) -> None:
    s = scheduler(stages=stages, rows=rows, chunk=chunk, groups=groups, prompts=prompts, prefix=prefix)
    pipeline = SimulatedPipeline(s, [linear(1, 0.2)] * stages, hop=0.05)  # type: ignore[list-item]
    pipeline.lose_load = lambda entry: bool(loses) and entry % loses == 0
    wanted: dict[int, int] = {}
    cancelled: set[int] = set()
    for what, a, b in trace:
        if what == "submit":
            wanted[pipeline.submit(request(prompt=a, tokens=b))] = b
        elif what == "cancel":
            pipeline.cancel(a)
            cancelled.add(a)
        else:
            for _ in range(a):
                pipeline.step()
    pipeline.run()
    assert s.idle
    assert pipeline.known_rows == set()
    drawn: Counter[int] = Counter()
    ended = Counter(e.sequence for _, e in pipeline.effects if isinstance(e, Ended))
    for _, effect in pipeline.effects:
        if isinstance(effect, Drew):
            assert effect.token.index == drawn[effect.sequence]
            drawn[effect.sequence] += 1
    for sequence, tokens in wanted.items():
        if sequence not in cancelled:
            assert ended[sequence] == 1
            assert drawn[sequence] == tokens
        else:
            assert ended[sequence] <= 1


def test_a_second_turn_computes_only_what_is_new() -> None:
    pipeline = SimulatedPipeline(scheduler(chunk=100, prefix=prefix_index()), [linear(1, 1)] * 3)  # type: ignore[list-item]
    pipeline.submit(request(prompt=40, tokens=5))
    pipeline.run()
    said = [e.token.token_id for _, e in pipeline.effects if isinstance(e, Drew)]
    turn = SequenceRequest("r", "m", (*range(1, 41), *said, 7, 8, 9), 3, Sampling())
    pipeline.submit(turn)
    pipeline.run()
    chunks = [m.tokens for _, m in pipeline.sent if m.kind is Kind.PREFILL]
    assert chunks[-1] == (said[-1], 7, 8, 9), "the last token of an answer was drawn and never computed"
    assert pipeline.effects[-1][1] == Ended(1, "length", 3, 44)


def test_a_tenant_never_begins_with_another_ones_entry() -> None:
    s = scheduler(chunk=100, prefix=prefix_index())
    pipeline = SimulatedPipeline(s, [linear(1, 1)] * 3)  # type: ignore[list-item]
    for tenant in ("a", "b", "", "a", "b"):
        pipeline.submit(request(prompt=40, tokens=2, tenant=tenant))
        pipeline.run()
    cached = [e.cached_tokens for _, e in pipeline.effects if isinstance(e, Ended)]
    assert cached == [0, 0, 0, 39, 39]
    assert s.statistics()["prefix_hits"] == 2
    assert s.statistics()["prefix_hit_tokens"] == 78


def test_an_entry_that_a_stage_lost_costs_a_prefill_and_nothing_else() -> None:
    prefix = prefix_index()
    pipeline = SimulatedPipeline(scheduler(chunk=100, prefix=prefix), [linear(1, 1)] * 3)  # type: ignore[list-item]
    pipeline.submit(request(prompt=40, tokens=5))
    pipeline.run()
    pipeline.lose_load = lambda _entry: True
    pipeline.submit(request(prompt=40, tokens=2))
    pipeline.run()
    ends = [e for _, e in pipeline.effects if isinstance(e, Ended)]
    assert ends[-1] == Ended(1, "length", 2, 0)
    indices = [e.token.index for _, e in pipeline.effects if isinstance(e, Drew) and e.sequence == 1]
    assert indices == [0, 1]
    assert pipeline.num_loads == 1


def test_short_prompts_share_a_microbatch() -> None:
    pipeline = SimulatedPipeline(scheduler(chunk=40, prompts=8), [linear(1, 1)] * 3)  # type: ignore[list-item]
    pipeline.scheduler.submit(request(prompt=9))
    pipeline.scheduler.submit(request(prompt=10))
    pipeline.scheduler.submit(request(prompt=8))
    pipeline.scheduler.submit(request(prompt=30))
    pipeline.pump()
    assert [m.row_lengths for _, m in pipeline.sent] == [(8, 9, 10), (30,)]
    pipeline.run()
    assert pipeline.scheduler.idle
