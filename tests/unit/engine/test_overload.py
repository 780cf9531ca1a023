"""The scheduler under more work than it has rows: order, patience, evictions, and that everybody hears an end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Ended, Failed, Policy, Started
from mlx_cluster.engine.waiting import Share
from mlx_cluster.errors import Overloaded, QueueTimeout
from mlx_cluster.microbatch import Microbatch
from mlx_cluster.request import Sampling, SequenceRequest
from tests.simulated_pipeline import SimulatedPipeline


def request(tenant: str = "", priority: int = 0, tokens: int = 4, patience: float | None = None) -> SequenceRequest:
    return SequenceRequest(
        "r", "m", (1, 2, 3), tokens, Sampling(), tenant=tenant, priority=priority, queue_seconds=patience
    )


def one_second(_microbatch: Microbatch) -> float:
    return 1.0


def pipeline(rows: int = 1, queue: int = 100, **shares: Share) -> SimulatedPipeline:
    policy = Policy(2, rows, queue, 4, lambda b: min(b, 2), shares=shares)
    return SimulatedPipeline(Scheduler(policy), [one_second, one_second])


def started(simulated: SimulatedPipeline) -> list[int]:
    return [effect.sequence for _, effect in simulated.effects if isinstance(effect, Started)]


def failures(simulated: SimulatedPipeline) -> dict[int, type[Exception]]:
    return {effect.sequence: type(effect.error) for _, effect in simulated.effects if isinstance(effect, Failed)}


def test_rows_go_to_the_higher_priority_and_in_turns_to_tenants() -> None:
    p = pipeline()
    first = p.submit(request("a"))
    waiting = [p.submit(request("a")) for _ in range(3)]
    other = p.submit(request("b"))
    urgent = p.submit(request("a", priority=5))
    p.run()
    assert started(p)[:2] == [first, urgent]
    assert started(p).index(other) <= 3
    assert sorted(started(p)) == sorted([first, *waiting, other, urgent])


def test_who_waited_too_long_is_given_up_and_told_when_to_come_back() -> None:
    p = pipeline()
    first = p.submit(request(tokens=40))
    hasty = p.submit(request(patience=10.0))
    patient = p.submit(request(patience=1000.0))
    p.run()
    assert failures(p) == {hasty: QueueTimeout}
    assert started(p) == [first, patient]
    error = next(effect.error for _, effect in p.effects if isinstance(effect, Failed))
    assert isinstance(error, QueueTimeout)
    assert error.retry_after_seconds >= 1
    assert "within 10 s" in str(error)
    told_at = next(at for at, effect in p.effects if isinstance(effect, Failed))
    assert 10 <= told_at <= 14  # as soon as anything happens after that; the engine looks every second besides


def test_a_newcomer_within_its_share_pushes_out_the_last_of_a_flood() -> None:
    p = pipeline(queue=3)
    flood = [p.submit(request("flood")) for _ in range(4)]  # one has the row
    late = p.submit(request("late"))
    p.run()
    assert failures(p) == {flood[-1]: Overloaded}
    assert set(started(p)) == {*flood[:-1], late}


def test_a_cancelled_one_leaves_the_queue() -> None:
    p = pipeline()
    first, second, third = (p.submit(request()) for _ in range(3))
    p.cancel(second)
    p.run()
    assert started(p) == [first, third]
    assert p.scheduler.idle


work = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "b"]),
        st.integers(-3, 3),
        st.integers(1, 12),
        st.sampled_from([None, 3.0, 30.0]),
        st.integers(0, 6),  # steps of the pipeline before the next one comes
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(work=work, rows=st.integers(1, 4), queue=st.integers(0, 6))
def test_everybody_who_was_taken_ends_exactly_once(
    work: list[tuple[str, int, int, float | None, int]], rows: int, queue: int
) -> None:
    p = pipeline(rows, queue, a=Share(3.0), b=Share(1.0, 2))
    taken: list[int] = []
    for tenant, priority, tokens, patience, steps in work:
        try:
            taken.append(p.submit(request(tenant, priority, tokens, patience)))
        except Overloaded:
            pass
        for _ in range(steps):
            p.step()
        assert p.scheduler.statistics()["waiting"] <= queue
    p.run()
    ended = [effect.sequence for _, effect in p.effects if isinstance(effect, Ended | Failed)]
    assert sorted(ended) == sorted(taken)
    assert p.scheduler.idle
    p.scheduler.audit()


# -- company for a lone prompt ------------------------------------------------------------------------


def batching(wait: float, chunk: int = 16, prompts: int = 8) -> Scheduler:
    return Scheduler(Policy(2, 8, 100, chunk, lambda b: min(b, 2), prompts, max_wait_seconds=wait))


def test_a_lone_short_prompt_waits_for_company_and_goes_with_it() -> None:
    s = batching(wait=0.05)
    s.submit(request(), 10.0)
    assert s.next(10.0) is None
    assert s.wakes_at == pytest.approx(10.05)
    s.submit(request(), 10.02)
    microbatch = s.next(10.02)
    assert microbatch is not None
    assert len(microbatch.rows) == 2
    assert s.wakes_at is None


def test_a_lone_short_prompt_goes_alone_when_nobody_came() -> None:
    s = batching(wait=0.05)
    s.submit(request(), 10.0)
    assert s.next(10.049) is None
    microbatch = s.next(10.05)
    assert microbatch is not None
    assert len(microbatch.rows) == 1


@pytest.mark.parametrize(
    ("wait", "prompt", "prompts", "emitted"),
    [(0.0, 3, 8, ()), (0.05, 9, 8, ()), (0.05, 3, 1, ()), (0.05, 3, 8, (4,))],
    ids=["no wait is set", "too long to share", "none may share", "resumed"],
)
def test_nobody_waits_for_company_in_vain(wait: float, prompt: int, prompts: int, emitted: tuple[int, ...]) -> None:
    s = batching(wait, prompts=prompts)
    s.submit(SequenceRequest("r", "m", tuple(range(1, prompt + 1)), 4, Sampling(), emitted=emitted), 10.0)
    assert s.next(10.0) is not None


def test_an_engine_is_told_when_patience_ends() -> None:
    s = batching(wait=0.0)
    for _ in range(8):
        s.submit(request(), 1.0)
    s.submit(request(patience=5.0), 2.0)
    assert s.wakes_at == 7.0
    s.expire(7.0)
    assert s.wakes_at is None
