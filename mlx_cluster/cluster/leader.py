"""Who is the coordinator.

Owns: the seam ``LeaderChoice`` and its simplest filling. Pure: the living nodes and the terms they name are arguments.
Does not own: what a coordinator does (``coordinator``).
Invariant: a node's view of the term never falls, it rises whenever this node takes the lead, and a term has one leader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mlx_cluster.cluster.membership import ClusterView


@dataclass(frozen=True, slots=True)
class Leadership:
    """Whom this node takes for the coordinator, and in which term; nobody before the first decision."""

    node_id: int | None
    term: int


class LeaderChoice(Protocol):
    def observe(self, view: ClusterView) -> Leadership:
        """Look at the table once per heartbeat; the returned leadership holds until the next call."""
        ...


class LowestLiveNode:
    """The living node with the lowest id leads. In a network split both sides have one, and so two documents.

    A node that takes the lead claims a term above every term it has heard of, out of a share of numbers that is its own
    (of n nodes the i-th claims terms i+1, i+1+n, i+1+2n …), so that no term ever has two coordinators. The others learn
    the term from its status.
    """

    def __init__(self, self_id: int, term: int = 0) -> None:
        self._self_id = self_id
        self._current = Leadership(None, term)

    def observe(self, view: ClusterView) -> Leadership:
        living = view.living
        highest = max([self._current.term, *(s.term for s in living), *(s.document[0] for s in living)])
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
