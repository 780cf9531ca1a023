"""Elections and worlds with one rule broken each: the checker must notice every one of them."""

from __future__ import annotations

from dataclasses import replace

from mlx_cluster.cluster.election import events as ev
from mlx_cluster.cluster.election.leading import Leading
from mlx_cluster.cluster.election.machine import Election, Role
from mlx_cluster.cluster.election.messages import Append, AppendReply, Message, VoteRequest
from mlx_cluster.cluster.election.values import Document, Version
from tests.sim.checker import Agent
from tests.sim.faults import unfold, world_of
from tests.sim.world import Node, World


class SpeaksBeforeTheDisk(Election):
    def _must_wait_for_disk(self) -> bool:
        return False


class CountsItselfBeforeItsDisk(Election):
    def _take(self, document: Document) -> None:
        super()._take(document)
        self.journal.on_disk = replace(self.journal.on_disk, document=document)


class VotesForOlderDocuments(Election):
    def _on_vote_request(self, message: Message, body: VoteRequest) -> None:
        super()._on_vote_request(message, replace(body, version=max(body.version, self.version)))


class VotesTwice(Election):
    def _on_vote_request(self, message: Message, body: VoteRequest) -> None:
        if self.role is Role.FOLLOWER:
            self.voted_for = None
        super()._on_vote_request(message, body)


class BreaksItsPromise(Election):
    def _is_free_for(self, candidate: str) -> bool:
        return self.leading is None


class ForgetsItsPromiseInACrash(Election):
    def start(self, now: float, chance: float) -> tuple[ev.Effect, ...]:
        effects = super().start(now, chance)
        self._abstains_until = now
        return effects


class LeaseWithoutMargin(Election):
    def _lease_seconds(self) -> float:
        return self.settings.timeout_min_seconds


class LeaseFromWhenTheAnswerCame(Election):
    def _on_append_reply(self, message: Message, body: AppendReply) -> None:
        super()._on_append_reply(message, AppendReply(self.now, body.accepted))


class TrustsAnOlderTerm(Election):
    """Counts what an earlier term left as if this term had committed it."""

    def _win(self) -> None:
        assert self.document is not None
        self.role, self.leader = Role.LEADER, self.voter
        self.leading, self.committed = Leading(self.voter, self.document, self.now), None
        self._broadcast(self.leading)


class FollowsADelayedLeader(Election):
    def _on_append(self, message: Message, body: Append) -> None:
        if self.leading is None and message.term < self.term:
            self.send(message.sender, AppendReply(body.sent_at, self.version), message.term)
            return
        super()._on_append(message, body)


class PromisesToAFormerLife(Election):
    """Answers a heartbeat of an older term in its own term, with that heartbeat's time."""

    def _on_append(self, message: Message, body: Append) -> None:
        if message.term < self.term:
            self.send(message.sender, AppendReply(body.sent_at, self.version))
            return
        super()._on_append(message, body)


class KeepsItsIdWithoutItsDisk(World):
    def blank_disk(self, node: Node) -> None:
        node.disks = 0
        super().blank_disk(node)


class CountsOnTheWallClock(World):
    def clock(self, node: Node) -> float:
        return super().clock(node) + node.wall


class _Obedient(Agent):
    def obeys(self, version: Version) -> bool:
        return True


class AgentsWithoutFence(World):
    def blank_disk(self, node: Node) -> None:
        super().blank_disk(node)
        node.agent = _Obedient()


Mutant = type[Election] | type[World]


def run_mutant(mutant: Mutant, seed: int) -> None:
    """One history of a mutant; raises ``Broken``."""
    unfold(world_of(seed, world=mutant) if issubclass(mutant, World) else world_of(seed, election=mutant))
