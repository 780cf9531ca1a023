"""The number of groups: from measured curves of any shape, within 5 % of the best fixed number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.curves import FIRM_STEPS, ChunkCurve, StepCurve
from mlx_cluster.engine.fill import Fill

CANARY = (1, 2, 4, 8, 16, 32)


def cycle(curve: Callable[[int], float], stages: int, hop: float, rows: int, groups: int) -> float:
    size, larger = divmod(rows, groups)
    sizes = [size + 1] * larger + [size] * (groups - larger)
    return max(sum(map(curve, sizes)), stages * (max(map(curve, sizes)) + hop))


def settled(curve: Callable[[int], float], stages: int, hop: float, rows: int) -> tuple[Fill, int]:
    """What it comes to when every decision is tried and measured."""
    fill = Fill(stages)
    for size in CANARY:
        for _ in range(FIRM_STEPS):
            for stage in range(stages):
                fill.observe(stage, size, curve(size))
            fill.observe_trip(stages * (curve(size) + hop), stages * curve(size))
    for _ in range(40):
        groups = fill.num_groups(rows)
        for _ in range(FIRM_STEPS):
            for size in {rows // groups, -(-rows // groups)}:
                for stage in range(stages):
                    fill.observe(stage, size, curve(size))
    return fill, fill.num_groups(rows)


CURVES: dict[str, Callable[[int], float]] = {
    "flat": lambda b: 0.02,
    "linear": lambda b: 0.005 * b,
    "affine": lambda b: 0.012 + 0.00125 * b,
    "one step": lambda b: 0.01 if b <= 12 else 0.03,
    "steps of eight": lambda b: 0.01 * -(-b // 8),
    "knee": lambda b: max(0.0044, 0.0014 * b),
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 12, 13, 24, 32])
def test_it_comes_within_5_percent_of_the_best_fixed_number(
    curve: Callable[[int], float], stages: int, rows: int
) -> None:
    _, groups = settled(curve, stages, 0.0008, rows)
    best = min(cycle(curve, stages, 0.0008, rows, n) for n in range(1, min(rows, 2 * stages) + 1))
    assert cycle(curve, stages, 0.0008, rows, groups) <= 1.05 * best


@settings(max_examples=300, deadline=None)
@given(
    times=st.lists(st.floats(0.001, 0.1), min_size=33, max_size=33).map(sorted),
    stages=st.integers(1, 8),
    rows=st.integers(1, 32),
)
def test_any_monotone_curve_does(times: list[float], stages: int, rows: int) -> None:
    def curve(b: int) -> float:
        return times[b]

    _, groups = settled(curve, stages, 0.0008, rows)
    best = min(cycle(curve, stages, 0.0008, rows, n) for n in range(1, min(rows, 2 * stages) + 1))
    assert cycle(curve, stages, 0.0008, rows, groups) <= 1.05 * best


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("stages", [2, 3])
def test_what_was_seen_in_passing_keeps_nobody_from_trying(curve: Callable[[int], float], stages: int) -> None:
    """Clients came before the rehearsal was done: small sizes are known, larger ones from disturbed steps."""
    rows = 16
    fill = Fill(stages)

    def observe(size: int, count: int, factor: float = 1.0) -> None:
        for _ in range(count):
            for stage in range(stages):
                fill.observe(stage, size, factor * curve(size))

    observe(1, 9)
    for size, count, factor in ((2, 4, 1.3), (3, 6, 1.2), (4, 9, 1.0), (5, 3, 2.5), (6, 4, 3.0), (7, 1, 4.0)):
        observe(size, count, factor)
    for _ in range(60):
        groups = fill.num_groups(rows)
        for size in {rows // groups, -(-rows // groups)}:
            observe(size, FIRM_STEPS)
    best = min(cycle(curve, stages, 0.001, rows, n) for n in range(1, 2 * stages + 1))
    assert cycle(curve, stages, 0.001, rows, fill.num_groups(rows)) <= 1.05 * best


def test_one_group_per_stage_until_it_has_measured() -> None:
    fill = Fill(3)
    assert [fill.num_groups(b) for b in (1, 2, 3, 8)] == [1, 2, 3, 3]
    assert fill.step_seconds(4) is None


def test_the_configured_bound_holds() -> None:
    fill, _ = settled(CURVES["linear"], 4, 0.01, 32)
    assert fill.num_groups(32) > 4, "a slow hop is hidden by more groups than stages"
    bounded = Fill(4, max_groups=2)
    assert bounded.num_groups(32) == 2


def test_the_hop_is_measured() -> None:
    fill = Fill(3)
    for excess in (0.003, 0.0031, 0.9):
        fill.observe_trip(0.06 + excess, 0.06)
    assert fill.hop_seconds == pytest.approx(0.0031 / 3)


def test_a_changed_machine_changes_the_answer() -> None:
    fill, before = settled(CURVES["linear"], 3, 0.0008, 12)
    assert before >= 3
    for _ in range(200):
        for size in (*CANARY, 3, 6, 12):
            for stage in range(3):
                fill.observe(stage, size, 0.05 if stage == 2 else 0.001)
    assert fill.num_groups(12) == 1, "one slow stage that does not mind rows: a step for each group is all it costs"


def test_a_step_that_the_system_delayed_does_not_count() -> None:
    curve = StepCurve()
    for seconds in (0.01, 0.01, 5.0, 0.01):
        curve.add(4, seconds)
    assert curve.at(4) == 0.01


def test_one_disturbed_size_does_not_make_larger_ones_impossible() -> None:
    curve = StepCurve()
    for rows, seconds in ((1, 0.0174), (2, 0.0243), (3, 0.0276), (4, 0.0299), (5, 0.0667)):
        for _ in range(9 if rows != 5 else 3):
            curve.add(rows, seconds)
    assert curve.at(16) < 3 * 0.0667
    assert curve.at(16, optimistic=True) < 4 * 0.0299, "size 5 is not firmly known: a larger group may be tried"


def test_sizes_that_nobody_has_used_for_hours_still_weigh_something() -> None:
    curve = StepCurve()
    for rows, seconds in ((16, 0.05), (32, 0.04)):
        for _ in range(9):
            curve.add(rows, seconds)
    for _ in range(600_000):
        curve.add(4, 0.01)
    assert curve.at(16) == curve.at(32) == pytest.approx(0.045)


def test_a_prediction_never_falls() -> None:
    curve = StepCurve()
    for rows, seconds in ((1, 0.02), (2, 0.01), (4, 0.03), (8, 0.029)):
        for _ in range(3):
            curve.add(rows, seconds)
    times = [curve.at(b) for b in range(1, 20)]
    assert times == sorted(times)


@settings(max_examples=100, deadline=None)
@given(
    a=st.floats(0, 1e-6),
    b=st.floats(1e-5, 1e-3),
    c=st.floats(0, 0.05),
    chunks=st.lists(st.tuples(st.integers(0, 16_000), st.integers(16, 512)), min_size=12, max_size=60, unique=True),
)
def test_chunk_times_are_fitted(a: float, b: float, c: float, chunks: list[tuple[int, int]]) -> None:
    curve = ChunkCurve()
    for position, length in chunks:
        squares = length * length + 2 * position * length
        curve.add(squares, length, a * squares + b * length + c)
    fitted = curve.terms
    assert min(fitted) >= 0
    for position, length in chunks:
        squares = length * length + 2 * position * length
        truth = a * squares + b * length + c
        told = fitted[0] * squares + fitted[1] * length + fitted[2]
        assert abs(told - truth) <= 0.25 * truth + 0.1 * max(b * 512, c)
