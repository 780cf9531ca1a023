"""The cluster document: what the coordinator has decided, whole, in one small value.

Owns: ``ClusterDocument``, its JSON form and its order. Does not own: who writes it (``coordinator``), where it is kept
(``node.state``), who has voted for it (``election``, to which it is an opaque body).
Invariant: a receiver never goes back to a lower (era, term, version), and never swaps two documents of equal rank.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_cluster.cluster.membership import Member
from mlx_cluster.errors import ConfigError, Fenced, PlanError
from mlx_cluster.plan import Plan

Rank = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class LeaderPin:
    """The operator's word: this node should lead, until ``expires_at`` (Unix seconds) where one was given."""

    node_id: int
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class ClusterDocument:
    """Members and plans as of (``era``, ``term``, ``version``). At most one plan per pipeline name.

    ``era`` counts the foundings of the cluster: a forced one outranks every term of the one before. ``drained`` nodes
    keep what they have until the coordinator has moved it, and get nothing new.
    """

    cluster: str
    term: int = 0
    version: int = 0
    members: tuple[Member, ...] = ()
    plans: tuple[Plan, ...] = ()
    era: int = 0
    drained: tuple[int, ...] = ()
    pin: LeaderPin | None = None

    def __post_init__(self) -> None:
        names = [plan.pipeline for plan in self.plans]
        if len(set(names)) != len(names):
            raise PlanError(f"two plans carry the same pipeline name: {sorted(names)}")

    @property
    def rank(self) -> Rank:
        return (self.era, self.term, self.version)

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
            "era": self.era,
            "drained": list(self.drained),
            "pin": asdict(self.pin) if self.pin is not None else None,
        }
        return json.dumps(data, sort_keys=True)

    def to_body(self) -> str:
        """The document without its rank, which is the election's to give."""
        return replace(self, era=0, term=0, version=0).to_text()

    @classmethod
    def from_body(cls, body: str, rank: Rank) -> ClusterDocument:
        """Inverse of ``to_body``, under the rank that it was committed with. Raises ``PlanError``."""
        era, term, version = rank
        return replace(cls.from_text(body), era=era, term=term, version=version)

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
                era=int(data["era"]),
                drained=tuple(int(node_id) for node_id in data["drained"]),
                pin=LeaderPin(**data["pin"]) if data["pin"] is not None else None,
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
