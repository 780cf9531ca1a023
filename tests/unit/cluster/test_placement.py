"""Placement: every layer once, never above a budget, and as good as trying everything."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.cluster.placement import (
    ManualRange,
    ModelCosts,
    NodeBudget,
    Objective,
    Placement,
    estimate_warnings,
    place,
)
from mlx_cluster.errors import PlanError
from mlx_cluster.plan import check_cover

EVEN = ModelCosts(0, (100,) * 28, 0)


def nodes(*budgets: int | None, speeds: tuple[float, ...] = ()) -> list[NodeBudget]:
    return [NodeBudget(i, f"n{i}", b, speeds[i] if speeds else 1.0) for i, b in enumerate(budgets)]


def counts(placement: Placement) -> dict[int, int]:
    return {a.node_id: a.num_layers for a in placement.assignments}


# -- automatic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_nodes", "expected"), [(1, [28]), (2, [14, 14]), (3, [10, 9, 9]), (4, [7] * 4), (5, [6, 6, 6, 5, 5])]
)
@pytest.mark.parametrize("speed", [1.0, 0.37])
def test_equal_nodes_get_the_even_split(num_nodes: int, expected: list[int], speed: float) -> None:
    placed = place(EVEN, nodes(*[None] * num_nodes, speeds=(speed,) * num_nodes))
    assert list(counts(placed).values()) == expected


def test_the_head_counts_as_layers() -> None:
    placed = place(ModelCosts(307, (131,) * 28, 307), nodes(None, None, None))
    assert counts(placed) == {0: 10, 1: 10, 2: 8}


def test_of_equal_cuts_the_one_is_made_that_leaves_loaded_layers_where_they_are() -> None:
    seven = ModelCosts(0, (100,) * 7, 0)
    assert counts(place(seven, nodes(None, None))) == {0: 4, 1: 3}
    assert counts(place(seven, nodes(None, None), loaded={1: (3, 7)})) == {0: 3, 1: 4}
    assert counts(place(EVEN, nodes(None, None), loaded={1: (3, 28)})) == {0: 14, 1: 14}, "never at the cost of speed"


def test_a_fast_node_gets_more() -> None:
    assert counts(place(EVEN, nodes(None, None, speeds=(3.0, 1.0)))) == {0: 21, 1: 7}


def test_a_node_that_only_slows_is_left_out() -> None:
    placed = place(EVEN, nodes(None, None, None, speeds=(1.0, 0.01, 1.0)))
    assert counts(placed) == {0: 14, 2: 14}
    assert [a.index for a in placed.assignments] == [0, 1]


def test_a_small_node_gets_what_fits() -> None:
    assert counts(place(EVEN, nodes(None, 300, None))) == {0: 13, 1: 3, 2: 12}


def test_latency_takes_the_fastest_node_alone() -> None:
    placed = place(EVEN, nodes(None, None, speeds=(1.0, 2.0)), objective="latency", hop_bytes=10)
    assert counts(placed) == {1: 28}


def test_a_costly_hop_saves_a_stage_where_it_gains_nothing() -> None:
    lumpy = ModelCosts(0, (900, 100, 100), 0)
    assert len(place(lumpy, nodes(None, None, None), hop_bytes=50).stages) == 2


def test_promised_cache_takes_memory_not_time() -> None:
    budgets = nodes(5_000, None, None)
    assert counts(place(EVEN, budgets)) == {0: 10, 1: 9, 2: 9}
    placed = place(ModelCosts(0, (100,) * 28, 0, kv_bytes=900), budgets)
    assert counts(placed) == {0: 5, 1: 12, 2: 11}
    assert [s.memory_bytes for s in placed.stages] == [5_000, 12_000, 11_000]


def test_does_not_fit_says_by_how_many_bytes_and_where() -> None:
    with pytest.raises(PlanError) as caught:
        place(ModelCosts(0, (100,) * 10, 50), nodes(500, 500))
    assert "50 B (50 bytes) are missing" in str(caught.value)
    assert "n1 would need 550 B for layers [5, 10) and has 500 B" in str(caught.value)


def test_a_stage_tells_why() -> None:
    placed = place(ModelCosts(7, (100,) * 2, 9), [NodeBudget(4, "mini1", 10_000, 2.0)])
    assert placed.stages[0].reason == "2 layers + embedding + head: 216 B of 10.0 kB, speed 2"
    assert placed.reason.startswith("automatic: the slowest stage (mini1)")


def test_a_tied_head_takes_the_embedding_along() -> None:
    tied = ModelCosts(300, (100,) * 8, 10, tied=True)
    assert [s.memory_bytes for s in place(tied, nodes(None, None)).stages] == [900, 510]
    assert [s.memory_bytes for s in place(tied, nodes(None)).stages] == [1110]
    everywhere = ModelCosts(300, (100,) * 9, 0, embedding_everywhere=True)
    assert [s.memory_bytes for s in place(everywhere, nodes(None, None, None)).stages] == [600, 600, 600]


def test_only_legal_cuts_are_made() -> None:
    costs = ModelCosts(0, (100,) * 8, 0, legal_cuts=frozenset({2, 7}))
    assert counts(place(costs, nodes(None, None))) == {0: 2, 1: 6}
    with pytest.raises(PlanError, match="cannot be cut before layer 4: its layers may be cut before 2, 7"):
        place(costs, nodes(None, None), manual=manual((0, 0, 4), (1, 4, 8)))


def test_no_node_and_bad_speed_are_refused() -> None:
    with pytest.raises(PlanError, match="start one"):
        place(EVEN, [])
    with pytest.raises(PlanError, match="above zero"):
        place(EVEN, nodes(None, speeds=(0.0,)))


# -- by hand ----------------------------------------------------------------------------------------


def manual(*ranges: tuple[int, int, int]) -> list[ManualRange]:
    return [ManualRange(*r) for r in ranges]


def test_a_manual_split_is_obeyed_in_any_order_of_nodes() -> None:
    placed = place(EVEN, nodes(None, None, None), manual=manual((2, 0, 3), (0, 3, 20), (1, 20, 28)))
    assert [(a.node_id, a.start, a.end) for a in placed.assignments] == [(2, 0, 3), (0, 3, 20), (1, 20, 28)]
    assert placed.reason == "manual: the split 3/17/8"


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 0, 10), (1, 11, 28)], "layers 10…10 are on no stage"),
        ([(0, 0, 10), (1, 9, 28)], "layers 9…9 are on two stages"),
        ([(0, 0, 10), (1, 10, 27)], "layers 27…27 are on no stage"),
        ([(0, 0, 10), (1, 10, 29)], "layers 28…28 do not exist"),
        ([(0, 0, 10), (0, 10, 28)], "two stages"),
    ],
)
def test_a_manual_split_with_a_gap_is_refused(ranges: list[tuple[int, int, int]], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        place(EVEN, nodes(None, None), manual=manual(*ranges))
    assert words in str(caught.value)


def test_a_manual_split_above_a_budget_is_refused() -> None:
    with pytest.raises(PlanError, match=r"n1 needs 1\.8 kB .* has 1\.0 kB; 800 B \(800 bytes\) are missing"):
        place(EVEN, nodes(None, 1000), manual=manual((0, 0, 10), (1, 10, 28)))


def test_without_one_of_its_nodes_a_split_gives_way() -> None:
    placed = place(EVEN, nodes(None, None), manual=manual((0, 0, 10), (1, 10, 19), (2, 19, 28)))
    assert counts(placed) == {0: 14, 1: 14}
    assert "nodes 2 of the split are away" in placed.reason


def test_estimates_that_are_far_off_are_told() -> None:
    placed = place(EVEN, nodes(None, None))
    assert estimate_warnings(placed, {0: 1400, 1: 1300}, {}) == []
    (line,) = estimate_warnings(placed, {1: 700}, {1: "mini2"})
    assert line == "mini2: estimated_memory says 700 B, the layers take 1.4 kB"


# -- against trying everything ------------------------------------------------------------------------

sizes = st.integers(1, 50)
models = st.builds(
    ModelCosts,
    st.integers(0, 60),
    st.lists(sizes, min_size=1, max_size=6).map(tuple),
    st.integers(0, 60),
    st.integers(0, 9),
)
clusters = st.lists(
    st.tuples(st.none() | st.integers(0, 250), st.sampled_from([0.5, 1.0, 1.7, 4.0])), min_size=1, max_size=4
).map(lambda rows: [NodeBudget(i, f"n{i}", budget, speed) for i, (budget, speed) in enumerate(rows)])

loads = st.dictionaries(
    st.integers(0, 4),
    st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair))),
    max_size=4,
)


def every_cut(costs: ModelCosts, cluster: list[NodeBudget]) -> list[list[tuple[NodeBudget, int, int]]]:
    """Every choice of nodes, in their order, with every choice of borders that keeps the budgets."""
    found = []
    for size in range(1, min(len(cluster), costs.num_layers) + 1):
        for chosen in combinations(cluster, size):
            for borders in combinations(range(1, costs.num_layers), size - 1):
                edges = [0, *borders, costs.num_layers]
                cut = list(zip(chosen, edges, edges[1:], strict=False))
                if all(n.budget_bytes is None or memory(costs, a, b) <= n.budget_bytes for n, a, b in cut):
                    found.append(cut)
    return found


def memory(costs: ModelCosts, start: int, end: int) -> int:
    total = sum(costs.layer_bytes[start:end]) + (end - start) * costs.kv_bytes
    return total + (costs.embedding_bytes if start == 0 else 0) + (costs.head_bytes if end == costs.num_layers else 0)


def seconds(costs: ModelCosts, node: NodeBudget, start: int, end: int, fastest: float) -> int:
    read = sum(costs.layer_bytes[start:end]) + (costs.head_bytes if end == costs.num_layers else 0)
    return round(read * (fastest / node.speed))


@settings(max_examples=200, deadline=None)
@given(models, clusters, st.sampled_from(["throughput", "latency"]), st.integers(0, 30), loads)
def test_as_good_as_trying_everything(
    costs: ModelCosts,
    cluster: list[NodeBudget],
    objective: Objective,
    hop: int,
    loaded: dict[int, tuple[int, int]],
) -> None:
    fastest = max(node.speed for node in cluster)

    def score(cut: list[tuple[NodeBudget, int, int]]) -> tuple[int, ...]:
        times = [seconds(costs, n, a, b, fastest) for n, a, b in cut]
        total = sum(times) + hop * len(times)
        ranges = [(max(a, there[0]), min(b, there[1])) for n, a, b in cut if (there := loaded.get(n.node_id))]
        kept = sum(sum(costs.layer_bytes[low:high]) for low, high in ranges)
        return (max(times), total, -kept) if objective == "throughput" else (total, -kept)

    cuts = every_cut(costs, cluster)
    if not cuts:
        with pytest.raises(PlanError, match="does not fit"):
            place(costs, cluster, objective=objective, hop_bytes=hop)
        return
    placed = place(costs, cluster, objective=objective, hop_bytes=hop, loaded=loaded)
    by_id = {node.node_id: node for node in cluster}
    cut = [(by_id[a.node_id], a.start, a.end) for a in placed.assignments]
    check_cover([(a, b) for _, a, b in cut], costs.num_layers)
    assert all(n.budget_bytes is None or memory(costs, a, b) <= n.budget_bytes for n, a, b in cut)
    assert [s.memory_bytes for s in placed.stages] == [memory(costs, a, b) for _, a, b in cut]
    assert score(cut) == min(map(score, cuts))
    assert placed == place(costs, cluster, objective=objective, hop_bytes=hop, loaded=loaded)
