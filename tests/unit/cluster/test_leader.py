from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.leader import FixedNode, Leadership
from tests.unit.cluster.builders import status, view


def test_the_fixed_node_leads_whatever_its_id_and_claims_one_term() -> None:
    fixed = FixedNode(1, 1)
    both = {0: status(0), 1: status(1)}
    assert fixed.observe(view(1, both)) == Leadership(1, 1)
    assert fixed.observe(view(1, both)) == Leadership(1, 1)


def test_the_others_follow_while_it_lives_and_nobody_leads_after() -> None:
    other = FixedNode(0, 1)
    both = {0: status(0), 1: status(1, term=6)}
    assert other.observe(view(0, both)) == Leadership(1, 6)
    assert other.observe(view(0, both, dead=frozenset({1}))) == Leadership(None, 6)


def test_a_fixed_node_without_a_memory_claims_a_term_above_all_that_others_remember() -> None:
    others = {0: status(0), 1: status(1, term=8), 2: status(2, document=(0, 9, 3))}
    assert FixedNode(0, 0).observe(view(0, others)) == Leadership(0, 10)


def test_word_of_a_higher_term_makes_it_claim_again() -> None:
    fixed = FixedNode(0, 0)
    fixed.observe(view(0, {0: status(0), 1: status(1)}))
    assert fixed.observe(view(0, {0: status(0), 1: status(1, term=5)})) == Leadership(0, 6)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=30), st.booleans())
def test_the_term_never_falls(trace: list[tuple[bool, int]], is_fixed: bool) -> None:
    choice = FixedNode(0 if is_fixed else 1, 0)
    own = 0 if is_fixed else 1
    last = 0
    for alive, named in trace:
        statuses = {0: status(0, term=named), 1: status(1, term=named)}
        dead = frozenset() if alive or is_fixed else frozenset({0})
        seen = choice.observe(view(own, dict(statuses), dead=dead))
        assert seen.term >= last
        last = seen.term
