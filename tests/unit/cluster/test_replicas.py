"""Replicas side by side and sharing nodes, other pipelines beside them, standby nodes, and measured costs."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.cluster.measured import Measured, measure, pays, with_measured
from mlx_cluster.cluster.placement import ManualRange, ModelCosts, NodeBudget, Placement, place
from mlx_cluster.cluster.replicas import Load, beside, loads_of, place_replicas, substituted, substitutes
from mlx_cluster.errors import PlanError
from mlx_cluster.plan import StageAssignment

MODEL = ModelCosts(0, (100,) * 12, 0)


def nodes(*speeds: float, budget: int | None = None) -> list[NodeBudget]:
    return [NodeBudget(i, f"n{i}", budget, speed) for i, speed in enumerate(speeds)]


def shape(placements: list[Placement]) -> list[list[tuple[int, int]]]:
    return [[(a.node_id, a.num_layers) for a in p.assignments] for p in placements]


def test_two_replicas_get_two_nodes_each() -> None:
    assert shape(place_replicas(MODEL, nodes(1, 1, 1, 1), 2)) == [[(0, 6), (1, 6)], [(2, 6), (3, 6)]]


def test_as_many_replicas_as_fit_side_by_side() -> None:
    placed = place_replicas(MODEL, nodes(1, 1, 1, budget=600), 2)
    assert len(placed) == 1, "the second one would need 1,200 bytes of the 600 that are left"
    with pytest.raises(PlanError, match="missing"):
        place_replicas(MODEL, nodes(1, budget=600), 2)


def test_more_replicas_than_nodes_share_them() -> None:
    placed = place_replicas(MODEL, nodes(1, 1), 3)
    assert len(placed) == 3
    assert sum(load.pipelines for load in loads_of(placed).values()) >= 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.2, 5), min_size=2, max_size=6), st.integers(2, 3))
def test_no_other_partition_into_neighbours_is_better(speeds: list[float], count: int) -> None:
    machines = nodes(*speeds)
    if count > len(machines):
        return
    found = sum(1 / p.slowest_cost for p in place_replicas(MODEL, machines, count))
    for cuts in combinations(range(1, len(machines)), count - 1):
        runs = [machines[a:b] for a, b in zip((0, *cuts), (*cuts, len(machines)), strict=True)]
        other = sum(1 / place(MODEL, run).slowest_cost for run in runs)
        assert found >= other * 0.999


def test_beside_another_pipeline_a_node_has_less_memory_and_time() -> None:
    left = beside([NodeBudget(0, "n0", 1000, 2.0), NodeBudget(1, "n1")], {0: Load(300, 1)})
    assert left == [NodeBudget(0, "n0", 700, 1.0), NodeBudget(1, "n1")]


def test_a_standby_takes_the_very_layers_of_the_absent_node() -> None:
    living = {0, 2, 3}.__contains__
    instead = substitutes([0, 1, 2], [3, 4], living)
    assert instead == {1: 3}
    split = [ManualRange(0, 0, 5), ManualRange(1, 5, 9), ManualRange(2, 9, 12)]
    assert substituted(split, instead) == [ManualRange(0, 0, 5), ManualRange(3, 5, 9), ManualRange(2, 9, 12)]


# -- measured costs ---------------------------------------------------------------------------------------


STAGES = (StageAssignment(0, 0, 0, 7), StageAssignment(1, 1, 7, 12))


def test_the_head_costs_what_was_seen_and_the_split_follows() -> None:
    weighed = ModelCosts(0, (100,) * 12, 250)
    assert shape([place(weighed, nodes(1, 1))]) == [[(0, 7), (1, 5)]]
    seen = measure(STAGES, (0.07, 0.0505), {})
    assert seen is not None
    assert seen.head_layers == pytest.approx(0.05)
    costs, machines = with_measured(weighed, nodes(1, 1), seen)
    better = place(costs, machines)
    assert shape([better]) == [[(0, 6), (1, 6)]]
    current = place(costs, machines, manual=[ManualRange(0, 0, 7), ManualRange(1, 7, 12)])
    assert pays(current, better) is (better.slowest_cost < 0.85 * current.slowest_cost)


def test_speeds_outside_the_plan_are_in_its_unit() -> None:
    seen = Measured({0: 100.0, 1: 50.0}, 0.0)
    _, machines = with_measured(MODEL, [*nodes(2.0, 1.0), NodeBudget(2, "n2", speed=4.0)], seen)
    assert [node.speed for node in machines] == [100.0, 50.0, 200.0]


def test_what_was_not_measured_teaches_nothing() -> None:
    assert measure(STAGES, (0.07,), {}) is None
    assert measure(STAGES, (0.07, 0.0), {}) is None
    assert measure(STAGES[:1], (0.07,), {}) is None


def test_a_small_gain_is_not_worth_a_pause() -> None:
    now = place(MODEL, nodes(1, 1), manual=[ManualRange(0, 0, 7), ManualRange(1, 7, 12)])
    even = place(MODEL, nodes(1, 1))
    assert now.slowest_cost == 700
    assert not pays(now, even), "7 → 6 layers is 14 %"
    assert pays(place(MODEL, nodes(1)), even)
    assert not pays(even, even)
