"""A stand-in for an election in tests of the coordinator: the lowest living node leads, with terms of its own."""

from __future__ import annotations

from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import ClusterView


class LowestLiveNode:
    """Of n nodes the i-th claims terms i+1, i+1+n, i+1+2n …, so that no term ever has two coordinators."""

    def __init__(self, self_id: int, term: int = 0) -> None:
        self._self_id = self_id
        self._current = Leadership(None, term)

    def observe(self, view: ClusterView) -> Leadership:
        living = view.living
        highest = max([self._current.term, *(s.term for s in living), *(s.document[1] for s in living)])
        lowest = min((s.node_id for s in living), default=None)
        takes_the_lead = lowest == self._self_id and (
            self._current.node_id != self._self_id or highest > self._current.term
        )
        self._current = Leadership(lowest, self._own_term_above(highest, view) if takes_the_lead else highest)
        return self._current

    def _own_term_above(self, highest: int, view: ClusterView) -> int:
        place = [node.node_id for node in view.nodes].index(self._self_id)
        count = len(view.nodes)
        return highest + 1 + (place - highest) % count
