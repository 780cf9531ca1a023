"""Memory: never over budget at any moment, everybody ends, and who was preempted goes on where it was."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine import memory
from mlx_cluster.engine.memory import Charge, KvBook, StageMemory, padded
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Ended, Policy, Started
from mlx_cluster.errors import ContextLengthExceeded
from mlx_cluster.microbatch import Kind, Microbatch
from mlx_cluster.request import Sampling, SequenceRequest
from tests.simulated_pipeline import SimulatedPipeline
from tests.stage_memory import HeldRows


def step(microbatch: Microbatch) -> float:
    return 1.0 if microbatch.kind is Kind.DECODE else 0.01 * len(microbatch.tokens)


class BoundedPipeline(SimulatedPipeline):
    """Looks at what the stages hold with every header."""

    held: HeldRows
    budget: int

    def _check_rows(self, microbatch: Microbatch) -> None:
        super()._check_rows(microbatch)
        peak = self.held.execute(microbatch)
        assert peak <= self.budget, f"{peak} positions in microbatch {microbatch.id}, {self.budget} fit"


def pipeline(blocks: int, *, stages: int = 3, rows: int = 64, chunk: int = 256, groups: int = 3) -> BoundedPipeline:
    """Room for so many blocks of positions, on the tightest of the stages."""
    budget = blocks * memory.BLOCK_POSITIONS
    room = tuple(StageMemory(budget * 10 * (2 if s else 1), 10, 0) for s in range(stages))
    policy = Policy(stages, rows, 1000, chunk, lambda b: min(b, groups), max_prompts=4, memory=room)
    made = BoundedPipeline(Scheduler(policy), [step] * stages)
    made.held, made.budget = HeldRows(), budget
    return made


def request(prompt: int, tokens: int, **kw: object) -> SequenceRequest:
    return SequenceRequest("r", "m", tuple(range(1, prompt + 1)), tokens, Sampling(), **kw)  # type: ignore[arg-type]


def endings(simulated: SimulatedPipeline) -> dict[int, Ended]:
    return {e.sequence: e for _, e in simulated.effects if isinstance(e, Ended)}


def indices(simulated: SimulatedPipeline) -> dict[int, list[int]]:
    drawn: dict[int, list[int]] = defaultdict(list)
    for _, effect in simulated.effects:
        if isinstance(effect, Drew):
            drawn[effect.sequence].append(effect.token.index)
    return drawn


def test_a_budget_that_is_never_reached_changes_nothing() -> None:
    bounded, free = pipeline(10_000), pipeline(10_000)
    free.scheduler = Scheduler(Policy(3, 64, 1000, 256, lambda b: min(b, 3), max_prompts=4))
    for simulated in (bounded, free):
        for index in range(9):
            simulated.submit(request(20 + index, 30))
        simulated.run()
    assert [m for _, m in bounded.sent] == [m for _, m in free.sent]
    assert bounded.scheduler.statistics()["prefilled_tokens"] == sum(20 + index for index in range(9))


def test_what_grows_beyond_the_budget_is_preempted_and_resumes_where_it_was() -> None:
    simulated = pipeline(8)
    sequences = [simulated.submit(request(200, 400)) for _ in range(4)]
    simulated.run()
    figures = simulated.scheduler.statistics()
    assert figures["preemptions"] > 0
    assert figures["prefilled_tokens"] > 4 * 200, "what was preempted is computed again, and that is counted"
    assert {s: e.reason for s, e in endings(simulated).items()} == dict.fromkeys(sequences, "length")
    assert indices(simulated) == {s: list(range(400)) for s in sequences}
    starts = Counter(e.sequence for _, e in simulated.effects if isinstance(e, Started))
    assert set(starts.values()) == {1}, "a client hears once that it was admitted"
    resumed = [spec for _, m in simulated.sent for spec in m.admit if spec.first_index]
    assert resumed
    assert simulated.scheduler.idle


def test_the_youngest_goes_and_the_oldest_never_does() -> None:
    simulated = pipeline(8)
    sequences = [simulated.submit(request(200, 400)) for _ in range(4)]
    simulated.run()
    admitted = Counter(s.first_index > 0 for _, m in simulated.sent for s in m.admit)
    assert admitted[True] <= 2 * len(sequences), "nobody is thrown out again and again"
    first_rows = [spec.row for _, m in simulated.sent for spec in m.admit if spec.first_index == 0]
    released_last = max(i for i, (_, m) in enumerate(simulated.sent) if m.release)
    assert first_rows[0] not in [r for _, m in simulated.sent[: released_last // 3] for r in m.release]


def test_a_prompt_that_never_fits_is_refused_with_the_bytes() -> None:
    simulated = pipeline(4)
    with pytest.raises(ContextLengthExceeded, match=r"1024 tokens need 12800 bytes .* stage 0, which has 10240"):
        simulated.scheduler.submit(request(1024, 1))
    simulated.submit(request(1023, 1))
    simulated.run()
    assert endings(simulated)[0].completion_tokens == 1


def test_alone_it_may_grow_to_all_there_is_and_ends_there() -> None:
    simulated = pipeline(4)
    simulated.submit(request(500, 5_000))
    simulated.run()
    assert endings(simulated)[0] == Ended(0, "length", 525)


def test_max_tokens_are_not_reserved() -> None:
    simulated = pipeline(30)
    for _ in range(8):
        simulated.submit(request(100, 100_000, stop_token_ids=frozenset()))
    for _ in range(100):
        simulated.step()
    assert simulated.scheduler.statistics()["decoding"] == 8


def test_a_very_long_row_decodes_alone_and_the_short_ones_are_not_padded() -> None:
    simulated = pipeline(100)
    simulated.submit(request(4_000, 60))
    for _ in range(8):
        simulated.submit(request(100, 60))
    simulated.run()
    for _, microbatch in simulated.sent:
        if microbatch.kind is Kind.DECODE and 0 in microbatch.rows:
            assert microbatch.rows == (0,)
    assert max(len(m.rows) for _, m in simulated.sent if m.kind is Kind.DECODE) > 2


def test_rows_of_several_lengths_all_get_their_turn_with_one_group() -> None:
    simulated = pipeline(400, stages=2, groups=1)
    sequences = [simulated.submit(request(100 * 3**index, 40)) for index in range(5)]
    simulated.run()
    assert set(endings(simulated)) == set(sequences)


trace = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 30]), st.sampled_from([1, 2, 5, 9, 20])),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 20), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=1_000, deadline=None)
@given(
    trace=trace,
    blocks=st.integers(8, 40),
    stages=st.integers(1, 4),
    rows=st.integers(1, 12),
    groups=st.integers(1, 6),
    chunk=st.sampled_from([3, 8, 40]),
)
def test_memory_is_never_over_budget_and_everybody_ends(
    trace: list[tuple[str, int, int]], blocks: int, stages: int, rows: int, groups: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "BLOCK_POSITIONS", 4)
        simulated = pipeline(blocks, stages=stages, rows=rows, chunk=chunk, groups=groups)
        wanted: dict[int, int] = {}
        cancelled: set[int] = set()
        for what, a, b in trace:
            if what == "submit":
                wanted[simulated.submit(request(a, b))] = min(b, blocks * 4 + 1 - a)
            elif what == "cancel":
                simulated.cancel(a)
                cancelled.add(a)
            else:
                for _ in range(a):
                    simulated.step()
        simulated.run()
    assert simulated.scheduler.idle
    assert simulated.known_rows == set()
    drawn, ended = indices(simulated), endings(simulated)
    for sequence, tokens in wanted.items():
        assert drawn[sequence] == list(range(len(drawn[sequence])))
        if sequence not in cancelled:
            assert ended[sequence].completion_tokens == len(drawn[sequence]) == tokens


@settings(max_examples=300, deadline=None)
@given(
    joins=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=25),
    stages=st.integers(1, 4),
    groups=st.integers(1, 8),
    slope=st.sampled_from([0.0, 0.1, 1.0]),
    bounded=st.booleans(),
)
def test_groups_settle_at_equal_steps_and_nobody_waits_long(
    joins: list[tuple[int, int]], stages: int, groups: int, slope: float, bounded: bool
) -> None:
    def seconds(rows: int) -> float:
        return 1.0 + slope * rows

    room = tuple(StageMemory(10**9, 1, 0) for _ in range(stages)) if bounded else ()
    policy = Policy(stages, 64, 1000, 64, lambda b: min(b, groups), step_seconds=seconds, memory=room)
    simulated = SimulatedPipeline(Scheduler(policy), [lambda m: seconds(len(m.rows))] * stages)
    for tokens, pause in joins:
        simulated.submit(request(3, 10 * tokens))
        for _ in range(pause):
            simulated.step()
    last_change = 0
    sizes: dict[int, tuple[int, int]] = {}  # group → (size, when)
    silent: Counter[int] = Counter()
    known: set[int] = set()
    seen = 0
    while True:
        for at, (_, header) in enumerate(simulated.sent[seen:], seen):
            if header.admit or header.release:
                last_change = at
                known = (known | {spec.row for spec in header.admit}) - set(header.release)
            if header.kind is Kind.DECODE:
                sizes[header.group] = (len(header.rows), at)
                silent.update(row for row in known if row not in header.rows)
                for row in header.rows:
                    silent[row] = 0
            cycle = 2 * (len(simulated.scheduler._groups) + 1)
            now = [size for size, when in sizes.values() if when > at - cycle]
            if at - last_change > 3 * cycle and now:
                slow, fast = seconds(max(now)), seconds(min(now))
                assert slow <= 1.25 * fast or max(now) - min(now) <= 1
            assert max((silent[row] for row in known), default=0) <= 6 * (groups + 2)
        seen = len(simulated.sent)
        if not simulated.step():
            break


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.integers(1, 900)),
            st.tuples(st.just("release"), st.integers(0, 30)),
            st.tuples(st.just("step"), st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True)),
        ),
        max_size=40,
    ),
    st.integers(0, 3),
)
def test_the_book_says_what_the_stages_hold(steps: list[tuple[str, object]], group: int) -> None:
    book, positions, alive = KvBook([StageMemory(10**9, 1, 0)]), {}, set()
    groups: dict[int, dict[int, int]] = {}
    next_row = 0
    for what, value in steps:
        if what == "admit":
            book.admit(next_row, value)  # type: ignore[arg-type]
            positions[next_row] = value
            alive.add(next_row)
            next_row += 1
        elif what == "release" and value in alive:
            book.release(value)  # type: ignore[arg-type]
            alive.discard(value)  # type: ignore[arg-type]
        elif what == "step":
            rows = [row for row in value if row in alive]  # type: ignore[attr-defined]
            if rows:
                group = (group + 1) % 3
                for other in groups.values():
                    for row in rows:
                        other.pop(row, None)
                groups[group] = {row: positions[row] for row in rows}
                book.step(group, groups[group])
        assert book.total.rows >= len(alive)
        assert book.total.positions >= sum(padded(positions[row]) for row in alive)
        if not alive:
            assert book.total == Charge()
