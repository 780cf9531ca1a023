from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.document import ClusterDocument, accept
from mlx_cluster.errors import ConfigError, Fenced, PlanError
from tests.unit.cluster.builders import members, plan


def document(term: int, version: int, note: int = 0) -> ClusterDocument:
    return ClusterDocument("c", term, version, tuple(members(note + 1)), (plan({0: 2, 1: 4}),))


def test_a_document_survives_its_text_and_keeps_its_hash() -> None:
    value = document(3, 4)
    again = ClusterDocument.from_text(value.to_text())
    assert again == value
    assert again.hash() == value.hash()
    assert document(3, 5).hash() != value.hash()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cluster": "c", "term": 1, "version": 1, "members": 3}'])
def test_what_is_not_a_document_says_so(text: str) -> None:
    with pytest.raises(PlanError, match="not a cluster document"):
        ClusterDocument.from_text(text)


def test_one_plan_per_pipeline() -> None:
    with pytest.raises(PlanError, match="same pipeline name"):
        ClusterDocument("c", plans=(plan({0: 2}), plan({1: 3})))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1)), max_size=30))
def test_a_receiver_never_goes_back(trace: list[tuple[int, int, int]]) -> None:
    current = document(0, 0)
    for term, version, note in trace:
        incoming = document(term, version, note)
        before = current
        try:
            current = accept(current, incoming)
        except Fenced:
            assert incoming.rank <= before.rank
            assert incoming != before
        else:
            assert current == incoming
            assert incoming.rank > before.rank or incoming == before


def test_another_cluster_is_refused() -> None:
    with pytest.raises(ConfigError, match="'other' reached a node of 'c'"):
        accept(document(0, 0), ClusterDocument("other", 9, 9))
