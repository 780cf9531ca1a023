"""Commands to a voter: proposals, changes of the voter set, hand-over, founding.

Owns: when each is allowed, and why not. Does not own: how a document is replicated (``machine``).
Invariant: one voter is added or removed at a time, by a leader whose document is committed in its own term; an id that
was removed never comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_cluster.cluster.election.events import (
    AddVoter,
    Bootstrap,
    Command,
    ForceNewCluster,
    Propose,
    RemoveVoter,
    TransferTo,
)
from mlx_cluster.cluster.election.messages import HandOver, RollCall
from mlx_cluster.cluster.election.seats import MAX_RETIRED, is_reachable, with_voter, without
from mlx_cluster.cluster.election.values import Document, Era, Version, node_of

if TYPE_CHECKING:
    from mlx_cluster.cluster.election.machine import Election

_UNREACHABLE = "too few of the voters that would be left answer: the change could never be committed"


def carry_out(voter: Election, command: Command) -> None:
    """Do it, or ``Refused`` with the reason."""
    refusal = _REFUSALS[type(command)](voter, command)
    if refusal:
        voter.refuse(command, refusal)


def somebody_answers(voter: Election, other: str) -> None:
    """A probe before a forced founding has failed: the cluster is not lost."""
    if voter.probing is not None:
        voter.refuse(voter.probing, f"{other} still answers: wait for it, or shut it down for good first")
        _end_probe(voter)


def found_anew(voter: Election) -> None:
    """Nobody has answered: the one voter of a new era is this one."""
    document = voter.document
    _end_probe(voter)
    if document is None:
        return
    voter.era = Era(voter.era.number + 1, voter.voter)
    gone = tuple(v for v in document.everyone if v != voter.voter)
    forced = replace(
        document,
        version=Version(voter.term + 1, document.version.index + 1),
        voters=(voter.voter,),
        previous=(),
        witnesses=(),
        retired=(*document.retired, *gone)[-MAX_RETIRED:],
        vacant=(),
    )
    voter.adopt(forced, voter.term + 1)


def _end_probe(voter: Election) -> None:
    voter.probing, voter.probe_ends = None, float("inf")


def _not_now(voter: Election) -> str:
    if voter.leading is None:
        return f"this node does not lead; {voter.leader or 'nobody known'} does"
    if not voter.is_idle:
        return "a write is under way: try again when it is committed"
    return ""


def _propose(voter: Election, command: Propose) -> str:
    refusal = _not_now(voter)
    if refusal or voter.document is None:
        return refusal
    if command.base != voter.version:
        return f"it was made from document {tuple(command.base)}, in force is {tuple(voter.version)}: make it again"
    voter.write(voter.document.next(voter.term, body=command.body))
    return ""


def _add(voter: Election, command: AddVoter) -> str:
    refusal, document = _not_now(voter), voter.document
    if refusal or document is None:
        return refusal
    if command.voter in document.retired:
        return f"{command.voter} was removed once: start that node with a blank election state"
    if any(node_of(v) == node_of(command.voter) for v in document.voters):
        return f"node {node_of(command.voter)} has a vote already"
    added = with_voter(document, command.voter, command.witness)
    if not is_reachable(voter, added, command.voter):
        return _UNREACHABLE
    voter.write(added.next(voter.term))
    return ""


def _remove(voter: Election, command: RemoveVoter) -> str:
    refusal, document = _not_now(voter), voter.document
    if refusal or document is None:
        return refusal
    if command.voter not in document.voters:
        return f"{command.voter} is no voter; the voters are {', '.join(document.voters)}"
    if command.voter == voter.voter:
        return "the leader cannot remove itself: transfer the lead first"
    removed = without(document, command.voter)
    witnesses = tuple(v for v in removed.witnesses if v != command.voter)
    if not set(removed.voters) - set(witnesses):
        return "only witnesses would be left, and a witness never leads"
    if not is_reachable(voter, removed):
        return _UNREACHABLE
    voter.write(replace(removed, witnesses=witnesses).next(voter.term))
    return ""


def _transfer(voter: Election, command: TransferTo) -> str:
    refusal, document, leading = _not_now(voter), voter.document, voter.leading
    if refusal or document is None or leading is None:
        return refusal
    if command.voter not in document.voters or command.voter == voter.voter:
        return f"{command.voter} is not another voter; the voters are {', '.join(document.voters)}"
    if command.voter in document.witnesses:
        return f"{command.voter} is a witness: it votes and stores, and never leads"
    if leading.peers[command.voter].accepted != voter.version:
        return f"{command.voter} has not yet accepted document {tuple(voter.version)}"
    voter.send(command.voter, HandOver())
    voter.step_down(f"handed over to {command.voter}")  # and with it the lease: the promises are void from here on
    return ""


def _bootstrap(voter: Election, command: Bootstrap) -> str:
    if voter.document is not None:
        return f"this voter has document {tuple(voter.version)}: the first voter set is given once"
    if voter.voter not in command.voters or len(set(command.voters)) != len(command.voters):
        return f"the first voters must be distinct and name {voter.voter}"
    if not set(command.voters) - set(command.witnesses):
        return "only witnesses would vote, and a witness never leads"
    voter.era = Era(1, voter.voter)
    voter.adopt(Document(Version(0, 1), command.body, command.voters, witnesses=command.witnesses), voter.term)
    return ""


def _force(voter: Election, command: ForceNewCluster) -> str:
    if voter.document is None:
        return "this node holds no document to go on with: bootstrap it, or force it where one is"
    if voter.leading is not None:
        return "this node leads: quorum is not lost"
    voter.probing = command
    voter.probe_ends = voter.now + 2 * voter.settings.timeout_max_seconds
    for other in voter.document.everyone:
        if other != voter.voter:
            voter.send_now(other, RollCall())
    return ""


_REFUSALS: dict[type, Callable[[Election, Any], str]] = {
    Propose: _propose,
    AddVoter: _add,
    RemoveVoter: _remove,
    TransferTo: _transfer,
    Bootstrap: _bootstrap,
    ForceNewCluster: _force,
}
