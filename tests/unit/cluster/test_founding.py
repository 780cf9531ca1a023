from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.founding import GRACE_SECONDS, Founding, found
from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.cluster.voter import MAX_VOTERS
from tests.unit.cluster.builders import status, view


def blank(node_id: int, **changes: Any) -> NodeStatus:
    return status(node_id, voter=f"{node_id}:a", **changes)


def test_the_lowest_node_founds_with_all_as_soon_as_all_are_there() -> None:
    three = {i: blank(i) for i in range(3)}
    assert found(view(0, dict(three)), "0:a", 0.1) == Founding(("0:a", "1:a", "2:a"), "0:a")
    other = found(view(1, dict(three)), "1:a", 0.1)
    assert (other.voters, other.backs) == ((), "0:a")


def test_nobody_founds_beside_a_cluster_that_somebody_knows() -> None:
    nodes: dict[int, NodeStatus | None] = {0: blank(0), 1: blank(1, founded=True), 2: blank(2)}
    assert found(view(0, nodes), "0:a", 99.0).voters == ()
    assert "mini1 knows this cluster" in found(view(0, nodes), "0:a", 99.0).waiting


def test_a_majority_may_found_without_the_rest_after_the_grace_period() -> None:
    nodes: dict[int, NodeStatus | None] = {0: None, 1: blank(1), 2: blank(2, backs="1:a")}
    early = found(view(1, nodes), "1:a", GRACE_SECONDS / 2)
    assert early.voters == ()
    assert "waits for mini0" in early.waiting
    assert found(view(1, nodes), "1:a", GRACE_SECONDS).voters == ("1:a", "2:a")
    unbacked: dict[int, NodeStatus | None] = {**nodes, 2: blank(2)}
    assert found(view(1, unbacked), "1:a", GRACE_SECONDS).voters == (), "the other one has not said so"
    assert found(view(2, unbacked), "2:a", GRACE_SECONDS).backs == "1:a"


def test_a_node_alone_in_a_cluster_of_two_waits_and_says_for_whom() -> None:
    alone = found(view(0, {0: blank(0), 1: None}), "0:a", 99.0)
    assert alone.voters == ()
    assert "missing: mini1" in alone.waiting


def test_a_large_cluster_has_no_more_voters_than_are_useful() -> None:
    nodes: dict[int, NodeStatus | None] = {i: blank(i) for i in range(10)}
    assert len(found(view(0, nodes), "0:a", 0.0).voters) == MAX_VOTERS


@given(
    st.lists(st.sampled_from(["there", "away", "unheard"]), min_size=2, max_size=6),
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_the_first_voters_are_always_a_majority_of_the_configured_nodes(states: list[str], backed: list[int]) -> None:
    """Whatever a node believes of the others: up to seven nodes, two foundings always share a voter."""
    nodes: dict[int, NodeStatus | None] = {
        i: None if state == "unheard" else blank(i, backs=f"{backed[i]}:a") for i, state in enumerate(states)
    }
    dead = frozenset(i for i, state in enumerate(states) if state == "away")
    for own in (i for i, state in enumerate(states) if state == "there"):
        founding = found(view(own, nodes, dead=dead), f"{own}:a", 99.0)
        assert not founding.voters or 2 * len(founding.voters) > len(states)
        assert not founding.voters or f"{own}:a" in founding.voters
