"""Who has a seat among the voters: one comes or goes at a time, and a lost disk gets its node's seat back.

Owns: the next voter set, and which era's messages are read. Does not own: when a change may begin (``operator``, and
``machine`` for joiners), how it is committed (``machine``).
Invariant: an id that was removed never comes back; both the set before a change and the one after it must agree to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_cluster.cluster.election.messages import (
    Append,
    Dismissal,
    Join,
    Message,
    RollCallReply,
    VoteReply,
    VoteRequest,
)
from mlx_cluster.cluster.election.values import BLANK, Document, node_of

if TYPE_CHECKING:
    from mlx_cluster.cluster.election.machine import Election

MAX_RETIRED = 256  # ids kept in the document; a message would have to be that many lost disks late to slip by


def asks_to_join(voter: Election, joiner: str) -> None:
    """A node without a seat has knocked."""
    document = voter.document
    if document is not None and joiner in document.voters:
        # It holds a seat and does not know it: the leader that gave it may be gone, and who has the document a
        # witness that never stands.
        voter.send(joiner, VoteReply(False, True, document))
        return
    if not voter.is_idle or document is None:
        return  # while its removal is not committed an id still counts, and may be needed to commit it
    if joiner in document.retired:
        voter.send(joiner, Dismissal())
        return
    successor = seat_for(document, joiner, voter.voter)
    if successor is not None and is_reachable(voter, successor, joiner):
        voter.write(replace(successor, version=document.next(voter.term).version))


def seat_for(document: Document, joiner: str, leader: str) -> Document | None:
    """The next step that gives a node with a new disk its seat back, or None when it is owed none.

    First the lost id goes, then, in a change of its own, the new one comes.
    """
    if joiner in document.voters:
        return None
    node = node_of(joiner)
    lost = next((v for v in document.voters if node_of(v) == node), None)
    if lost is not None:
        if lost == leader or len(document.voters) == 1:
            return None
        return replace(without(document, lost), vacant=(*document.vacant, lost))
    owed = next((v for v in document.vacant if node_of(v) == node), None)
    if owed is None:
        return None
    seated = with_voter(document, joiner, owed in document.witnesses)
    return replace(
        seated,
        vacant=tuple(v for v in document.vacant if v != owed),
        witnesses=tuple(v for v in seated.witnesses if v != owed),
    )


def with_voter(document: Document, voter: str, witness: bool) -> Document:
    return replace(
        document,
        voters=(*document.voters, voter),
        previous=document.voters,
        witnesses=(*document.witnesses, voter) if witness else document.witnesses,
    )


def without(document: Document, voter: str) -> Document:
    return replace(
        document,
        voters=tuple(v for v in document.voters if v != voter),
        previous=document.voters,
        retired=(*document.retired, voter)[-MAX_RETIRED:],
    )


def is_reachable(voter: Election, document: Document, besides: str = "") -> bool:
    """Whether the voters heard of late (and ``besides``) are a majority of every set, so that it can be committed."""
    if voter.leading is None:
        return False
    since = voter.now - voter.settings.timeout_max_seconds
    heard = {v for v, peer in voter.leading.peers.items() if peer.heard >= since}
    return document.is_majority(heard | {voter.voter, besides})


def era_passes(voter: Election, message: Message) -> bool:
    """Whether a message of another era may be read; learns a higher era, or is retired by it."""
    if message.era.number < voter.era.number:
        if isinstance(message.body, Join):
            return message.era == BLANK
        if not isinstance(message.body, RollCallReply):
            voter.send_now(message.sender, RollCallReply(0))  # carries the era in force
        return False
    if message.era.number == voter.era.number:
        return False  # two clusters were founded beside each other: they never mix
    if voter.document is not None:
        voter.retire(f"the cluster was founded anew as {message.era}, this voter belongs to {voter.era}")
        return False
    if isinstance(message.body, Append | VoteRequest | VoteReply):
        voter.era = message.era
        voter.journal.changed = True
        return True
    return False
