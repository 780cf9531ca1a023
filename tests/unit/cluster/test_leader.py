from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.leader import Leadership, LowestLiveNode
from tests.unit.cluster.builders import status, view


def test_the_lowest_living_node_leads_and_claims_a_term() -> None:
    choice = LowestLiveNode(0)
    both = {0: status(0), 1: status(1)}
    assert choice.observe(view(0, both)) == Leadership(0, 1)
    assert choice.observe(view(0, both)) == Leadership(0, 1)


def test_a_follower_learns_the_term_from_the_leader() -> None:
    choice = LowestLiveNode(1)
    assert choice.observe(view(1, {0: status(0, term=6), 1: status(1)})) == Leadership(0, 6)


def test_the_successor_claims_a_higher_term_and_the_returning_node_a_higher_one_still() -> None:
    successor = LowestLiveNode(1)
    successor.observe(view(1, {0: status(0, term=6), 1: status(1)}))
    took = successor.observe(view(1, {0: status(0, term=6), 1: status(1)}, dead=frozenset({0})))
    assert took == Leadership(1, 8), "of two nodes the second one claims even terms"
    returned = LowestLiveNode(0)
    assert returned.observe(view(0, {0: status(0), 1: status(1, term=8)})) == Leadership(0, 9)
    assert successor.observe(view(1, {0: status(0, term=9), 1: status(1)})) == Leadership(0, 9)


def test_terms_named_by_documents_count_too() -> None:
    assert LowestLiveNode(0).observe(view(0, {0: status(0), 1: status(1, document=(9, 3))})) == Leadership(0, 11)


@given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.integers(0, 20)), max_size=30))
def test_the_term_never_falls_and_rises_with_every_taking_of_the_lead(trace: list[tuple[set[int], int]]) -> None:
    choice = LowestLiveNode(1)
    last = Leadership(None, 0)
    for dead, named in trace:
        statuses = {i: status(i, term=named if i != 1 else last.term) for i in range(4)}
        seen = choice.observe(view(1, dict(statuses), dead=frozenset(dead - {1})))
        assert seen.term >= last.term
        assert seen.node_id == min(i for i in range(4) if i == 1 or i not in dead)
        if seen.node_id == 1 and last.node_id != 1:
            assert seen.term > last.term
        last = seen


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=30))
def test_no_term_is_claimed_by_two_nodes_even_when_they_do_not_hear_each_other(trace: list[tuple[int, int]]) -> None:
    """Each node hears of some term and finds itself alone, in any order: the claims of two nodes never meet."""
    owner: dict[int, int] = {}
    terms = dict.fromkeys(range(4), 0)
    for node, named in trace:
        choice = LowestLiveNode(node, max(terms[node], named))
        statuses = {i: status(i, term=terms[i]) for i in range(4)}
        claimed = choice.observe(view(node, dict(statuses), dead=frozenset(set(range(4)) - {node})))
        assert claimed.node_id == node
        assert claimed.term > terms[node]
        assert owner.setdefault(claimed.term, node) == node
        terms[node] = claimed.term
