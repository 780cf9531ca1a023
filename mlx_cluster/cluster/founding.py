"""The one founding of a cluster: which blank node may name the first voters, and whom.

Owns: the rule. Pure. Does not own: the election that follows (``election``), who is asked later to join (``voter``).
Invariant: the first voter set is a majority of the configured nodes, so that of two foundings at once only one can ever
elect anybody; nobody founds while a living node knows a founded cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_cluster.cluster.membership import ClusterView
from mlx_cluster.cluster.voter import MAX_VOTERS

GRACE_SECONDS = 10.0  # how long everybody is waited for before a majority founds without the rest


@dataclass(frozen=True, slots=True)
class Founding:
    """``voters``: found the cluster with these, now. ``backs``: whom this node would have found it."""

    voters: tuple[str, ...] = ()
    backs: str = ""
    waiting: str = ""


def found(view: ClusterView, own_voter: str, waited_seconds: float) -> Founding:
    """What a node that knows no founded cluster does now.

    While everybody is there the lowest node id founds with all at once. Later the lowest living one may, with those who
    back it in their heartbeats, as soon as they are more than half of the configured nodes.
    """
    living = sorted(view.living, key=lambda s: s.node_id)
    founded = [s.name for s in living if s.founded]
    if founded:
        return Founding(waiting=f"{founded[0]} knows this cluster: waiting for its coordinator to give a seat")
    blank = [s for s in living if s.voter and (s.node_id != view.self_id or s.voter == own_voter)]
    if len(blank) == len(view.nodes):
        if blank[0].node_id == view.self_id:
            return Founding(tuple(s.voter for s in blank[:MAX_VOTERS]), own_voter)
        return Founding(backs=blank[0].voter, waiting=f"{blank[0].name} founds the cluster")
    missing = ", ".join(n.member.name for n in view.nodes if n.node_id not in {s.node_id for s in blank})
    if waited_seconds < GRACE_SECONDS or not blank:
        return Founding(waiting=f"the first start of this cluster waits for {missing}")
    first = blank[0]
    backers = [s for s in blank if (s.backs if s.node_id != view.self_id else first.voter) == own_voter]
    if first.node_id == view.self_id and 2 * len(backers) > len(view.nodes):
        return Founding(tuple(s.voter for s in backers[:MAX_VOTERS]), own_voter)
    return Founding(
        backs=first.voter,
        waiting=f"a majority of the {len(view.nodes)} configured nodes must be there at the first start; "
        f"missing: {missing}",
    )
