"""A plan that exists is valid; what is not valid says what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.errors import PlanError
from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment, check_cover, even_counts, ranges_from_counts


def plan(*ranges: tuple[int, int], layers: int = 28) -> Plan:
    stages = tuple(StageAssignment(i, i, start, end) for i, (start, end) in enumerate(ranges))
    return Plan("p", 1, ModelRef("m", "h", layers), stages, "grpc")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 10), (11, 28)], "layers 10…10 are on no stage: stage 1 starts at 11; let it start at 10"),
        ([(0, 10), (9, 28)], "layers 9…9 are on two stages"),
        ([(0, 10), (10, 27)], "layers 27…27 are on no stage: the split ends at 27, the model has 28 layers"),
        ([(0, 10), (10, 30)], "layers 28…29 do not exist"),
        ([(0, 10), (10, 10), (10, 28)], "stage 1 holds no layer"),
        ([], "no stage holds any"),
    ],
)
def test_a_bad_split_is_named(ranges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        plan(*ranges)


def test_stage_indices_are_in_order() -> None:
    stages = (StageAssignment(1, 0, 0, 10), StageAssignment(0, 1, 10, 28))
    with pytest.raises(PlanError, match="stage indices"):
        Plan("p", 1, ModelRef("m", "h", 28), stages, "grpc")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_counts_become_ranges_that_cover(counts: list[int]) -> None:
    ranges = ranges_from_counts(counts, sum(counts))
    assert [end - start for start, end in ranges] == counts
    check_cover(ranges, sum(counts))
    with pytest.raises(PlanError):
        ranges_from_counts(counts, sum(counts) + 1)


@given(st.integers(1, 200), st.integers(1, 64))
def test_even_counts(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(PlanError, match="cannot be cut"):
            even_counts(layers, stages)
        return
    counts = even_counts(layers, stages)
    assert sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_28_layers_over_three_nodes() -> None:
    assert even_counts(28, 3) == [10, 9, 9]


def test_a_plan_survives_json_and_its_hash_tells_plans_apart() -> None:
    first, second = plan((0, 10), (10, 28)), plan((0, 11), (11, 28))
    assert Plan.from_json(first.to_json()) == first
    assert first.hash() == Plan.from_json(first.to_json()).hash() != second.hash()


def test_epochs_are_compared_version_first() -> None:
    assert Epoch(1, 9) < Epoch(2, 0) < Epoch(2, 1)
    assert Epoch.parse(str(Epoch(3, 4))) == Epoch(3, 4)
    with pytest.raises(ValueError, match="invalid literal"):
        Epoch.parse("nonsense")
