"""Who is the coordinator.

Owns: the seam ``LeaderChoice`` and its simplest filling. Pure: the living nodes and the terms they name are arguments.
Does not own: what a coordinator does (``coordinator``).
Invariant: a node's view of the term never falls, and it rises whenever this node takes the lead.
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
    """The living node with the lowest id leads. Not safe in a network split: both sides have a lowest node.

    A node that takes the lead claims a term above every term it has heard of; the others learn it from its status.
    """

    def __init__(self, self_id: int, term: int = 0) -> None:
        self._self_id = self_id
        self._current = Leadership(None, term)

    def observe(self, view: ClusterView) -> Leadership:
        living = view.living
        highest_term = max([self._current.term, *(s.term for s in living), *(s.document[0] for s in living)])
        lowest = min((s.node_id for s in living), default=None)
        takes_the_lead = lowest == self._self_id and (
            self._current.node_id != self._self_id or highest_term > self._current.term
        )
        self._current = Leadership(lowest, highest_term + 1 if takes_the_lead else highest_term)
        return self._current
