"""Who is the coordinator.

Owns: the value ``Leadership``, and the rule of a fixed coordinator. Pure: the living nodes and the terms they name are
arguments.
Does not own: what a coordinator does (``coordinator``), how one is elected (``election``).
Invariant: a node's view of the term never falls, and it rises whenever this node takes the lead.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_cluster.cluster.membership import ClusterView


@dataclass(frozen=True, slots=True)
class Leadership:
    """Whom this node takes for the coordinator, and in which term; nobody before the first decision."""

    node_id: int | None
    term: int


class FixedNode:
    """One configured node leads whenever it lives: for nodes whose disks do not outlive their processes.

    Each of its lives claims a term above every term it has heard of; the others learn the term from its status.
    """

    def __init__(self, self_id: int, fixed_id: int, term: int = 0) -> None:
        self._self_id, self._fixed_id = self_id, fixed_id
        self._current = Leadership(None, term)

    def observe(self, view: ClusterView) -> Leadership:
        """Look at the table once per heartbeat; the returned leadership holds until the next call."""
        living = view.living
        highest = max([self._current.term, *(s.term for s in living), *(s.document[1] for s in living)])
        if self._self_id == self._fixed_id:
            claims = self._current.node_id is None or highest > self._current.term
            self._current = Leadership(self._self_id, highest + 1 if claims else highest)
        else:
            lives = any(s.node_id == self._fixed_id for s in living)
            self._current = Leadership(self._fixed_id if lives else None, highest)
        return self._current
