from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.node.traffic import WINDOW_SECONDS, Traffic


def test_rates_are_of_the_last_seconds() -> None:
    traffic = Traffic()
    assert traffic.rates(0.0, [0, 0]) == ()
    assert traffic.rates(0.5, [500, 0]) == ()
    assert traffic.rates(1.0, [1000, 10]) == (1000.0, 10.0)
    for second in range(2, 40):
        rates = traffic.rates(float(second), [1000, 10])
    assert rates == (0.0, 0.0), "what was sent half a minute ago is forgotten"


def test_another_engine_starts_from_nothing() -> None:
    traffic = Traffic()
    traffic.rates(0.0, [5000])
    assert traffic.rates(2.0, [9000]) == (2000.0,)
    assert traffic.rates(3.0, [100]) == ()
    assert traffic.rates(5.0, [300]) == (100.0,)
    assert traffic.rates(6.0, [300, 0]) == (), "nor do links of another number compare"


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 10**6)), min_size=1, max_size=80))
def test_a_rate_is_never_above_the_quickest_stretch_and_the_window_is_bounded(steps: list[tuple[float, int]]) -> None:
    traffic, now, total = Traffic(), 0.0, 0
    for seconds, sent in steps:
        now, total = now + seconds, total + sent
        (rate,) = traffic.rates(now, [total]) or (0.0,)
        assert 0.0 <= rate <= total + 1.0, "a rate is over a second at least"
        assert len(traffic._seen) <= WINDOW_SECONDS + 3
