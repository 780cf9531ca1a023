from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.retry import Backoff, CircuitBreaker, RetryBudget


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_pause_is_drawn_from_nothing_up_to_a_bound_that_doubles(attempt: int, chance: float) -> None:
    backoff = Backoff(first_seconds=0.1, longest_seconds=2.0)
    assert backoff.pause_seconds(attempt, 0.0) == 0.0
    assert backoff.pause_seconds(attempt, chance) <= backoff.pause_seconds(attempt, 1.0) <= 2.0
    assert backoff.pause_seconds(attempt, 1.0) == min(2.0, 0.1 * 2 ** min(attempt - 1, 32))


def test_a_budget_is_spent_and_fills_with_time() -> None:
    budget = RetryBudget(0.0, capacity=3.0, per_second=0.5)
    assert [budget.spend(0.0) for _ in range(4)] == [True, True, True, False]
    assert not budget.spend(1.9)
    assert budget.spend(2.0)
    assert not budget.spend(2.0)
    assert budget.tokens(1000.0) == 3.0


@given(st.lists(st.floats(0, 5), max_size=60))
def test_a_budget_never_gives_more_than_its_capacity_and_its_rate(gaps: list[float]) -> None:
    budget, now, spent = RetryBudget(0.0, capacity=3.0, per_second=0.5), 0.0, 0
    for gap in gaps:
        now += gap
        spent += budget.spend(now)
    assert spent <= 3.0 + 0.5 * now + 1e-6


def failed(breaker: CircuitBreaker, now: float) -> bool:
    """Whether a call passed; it failed then."""
    if not breaker.begin(now):
        return False
    breaker.failed(now)
    return True


def test_a_circuit_opens_after_failures_in_a_row_and_lets_one_through_after_its_pause() -> None:
    breaker = CircuitBreaker(threshold=3, first_seconds=1.0, longest_seconds=3.0)
    assert [failed(breaker, 0.0) for _ in range(4)] == [True, True, True, False]
    assert breaker.state == "open"
    assert breaker.wait_seconds(0.25) == 0.75
    assert breaker.begin(1.0)
    assert breaker.state == "half_open"
    assert not breaker.begin(1.0), "one trial at a time"
    breaker.failed(1.0)
    assert breaker.wait_seconds(1.0) == 2.0, "the pause doubles"
    assert failed(breaker, 3.0)
    assert breaker.wait_seconds(3.0) == 3.0, "up to a bound"
    assert breaker.begin(6.0)
    breaker.succeeded()
    assert breaker.state == "closed"
    assert [failed(breaker, 6.0) for _ in range(4)] == [True, True, True, False]
    assert breaker.wait_seconds(6.0) == 1.0, "a success starts the pauses anew"


def test_an_answer_in_between_keeps_a_circuit_closed() -> None:
    breaker = CircuitBreaker(threshold=2)
    for _ in range(5):
        assert failed(breaker, 0.0)
        assert breaker.begin(0.0)
        breaker.succeeded()
    assert breaker.state == "closed"


def test_whoever_leaves_a_trial_leaves_it_to_the_next() -> None:
    breaker = CircuitBreaker(threshold=1, first_seconds=1.0)
    assert failed(breaker, 0.0)
    assert breaker.begin(1.0)
    breaker.left()
    assert breaker.state == "half_open"
    assert breaker.begin(1.0)


def test_a_heartbeat_closes_an_open_circuit() -> None:
    breaker = CircuitBreaker(threshold=1)
    assert failed(breaker, 0.0)
    breaker.succeeded()
    assert breaker.begin(0.0)
