"""The cluster document: what the coordinator has decided, whole, in one small value.

Owns: ``ClusterDocument``, its JSON form and its order. Does not own: who writes it (``coordinator``), where it is kept
(``node.state``).
Invariant: a receiver never goes back to a lower (term, version), and never swaps two documents of equal rank.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mlx_cluster.cluster.membership import Member
from mlx_cluster.errors import ConfigError, Fenced, PlanError
from mlx_cluster.plan import Plan


@dataclass(frozen=True, slots=True)
class ClusterDocument:
    """Members and plans as of (``term``, ``version``). At most one plan per pipeline name."""

    cluster: str
    term: int = 0
    version: int = 0
    members: tuple[Member, ...] = ()
    plans: tuple[Plan, ...] = ()

    def __post_init__(self) -> None:
        names = [plan.pipeline for plan in self.plans]
        if len(set(names)) != len(names):
            raise PlanError(f"two plans carry the same pipeline name: {sorted(names)}")

    @property
    def rank(self) -> tuple[int, int]:
        return (self.term, self.version)

    def plan(self, pipeline: str) -> Plan | None:
        return next((plan for plan in self.plans if plan.pipeline == pipeline), None)

    def hash(self) -> str:
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]

    def to_text(self) -> str:
        data = {
            "cluster": self.cluster,
            "term": self.term,
            "version": self.version,
            "members": [{"node_id": m.node_id, "name": m.name, "host": m.host} for m in self.members],
            "plans": [plan.to_json() for plan in self.plans],
        }
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> ClusterDocument:
        """Inverse of ``to_text``. Raises ``PlanError`` on anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(
                cluster=data["cluster"],
                term=int(data["term"]),
                version=int(data["version"]),
                members=tuple(Member(**m) for m in data["members"]),
                plans=tuple(Plan.from_json(p) for p in data["plans"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a cluster document: {error!r}") from error


def accept(current: ClusterDocument, incoming: ClusterDocument) -> ClusterDocument:
    """The document in force after ``incoming`` has arrived; equal ones may arrive any number of times.

    Raises ``Fenced`` for a lower rank, or another content under the same rank; ``ConfigError`` for another cluster.
    """
    if incoming.cluster != current.cluster:
        raise ConfigError(
            f"a document of cluster {incoming.cluster!r} reached a node of {current.cluster!r}: "
            "check cluster.name and the addresses in cluster.yaml"
        )
    if incoming.rank < current.rank:
        raise Fenced(f"document {incoming.rank} is older than {current.rank}, which is in force")
    if incoming.rank == current.rank and incoming != current:
        raise Fenced(f"two different documents carry {incoming.rank}: the coordinator must commit a newer one")
    return incoming
