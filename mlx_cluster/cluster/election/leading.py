"""What a leader knows about its voters.

Owns: who has accepted what, who was heard when, and since when a majority has followed. Does not own: what is done
about it (``machine``).
Invariant: only word from a voter moves its row; a new voter starts with nothing accepted and no promise given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_cluster.cluster.election.values import NOTHING, Document, Version


@dataclass(slots=True)
class Peer:
    """``heard`` on the leader's clock; ``promised``: when the latest heartbeat was sent that this voter answered."""

    heard: float
    promised: float = -math.inf
    accepted: Version = NOTHING


class Leading:
    """One leadership, from winning to stepping down. ``announced``: it may act."""

    def __init__(self, self_id: str, document: Document, now: float) -> None:
        self._self_id = self_id
        self.peers: dict[str, Peer] = {}
        self.announced = False
        self.heartbeat_at = now
        self.confirmed_since = now
        self.follow(document, now)

    def follow(self, document: Document, now: float) -> None:
        """Keep exactly the voters of this document; a new one gets a full time-out to answer."""
        self.peers = {v: self.peers.get(v) or Peer(now) for v in document.everyone if v != self._self_id}

    def replied(self, voter: str, accepted: Version, sent_at: float | None, now: float) -> None:
        peer = self.peers.get(voter)
        if peer is not None:
            peer.heard = now
            if sent_at is not None:
                peer.promised = max(peer.promised, sent_at)
            peer.accepted = max(peer.accepted, accepted)

    def woke_late(self, now: float) -> None:
        """Nobody is blamed for the time that this voter slept through; nothing is confirmed until they answer again."""
        for peer in self.peers.values():
            peer.heard = now
        self.confirmed_since = now
        self.heartbeat_at = now

    def accepted(self, version: Version) -> set[str]:
        return {voter for voter, peer in self.peers.items() if peer.accepted == version}

    def heard_by_majority(self, document: Document) -> float:
        """Since when a majority of every set, this voter included, has not been silent."""
        times = {voter: peer.heard for voter, peer in self.peers.items()}
        times[self._self_id] = math.inf
        return document.reached(times)

    def promised_by_majority(self, document: Document) -> float:
        times = {voter: peer.promised for voter, peer in self.peers.items()}
        times[self._self_id] = math.inf
        return document.reached(times)
