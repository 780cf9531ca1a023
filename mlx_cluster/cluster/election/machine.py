"""One voter: Raft's election, with one document in the place of the log.

Owns: terms, votes, the accepted document, the lease, changes of the voter set. Pure: events, ``now`` and ``chance`` are
arguments, effects are what comes back.
Does not own: clock, disk, network, dice, and what a leader decides (``coordinator``).
Invariant: nothing that depends on a change of the durable state leaves before that change is on the disk; a term has at
most one leader; a committed document is part of every later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from mlx_cluster.cluster.election import operator, seats
from mlx_cluster.cluster.election.events import (
    BecomeLeader,
    Blind,
    Command,
    Committed,
    Effect,
    Event,
    Knock,
    Persist,
    Persisted,
    Refused,
    Retire,
    Send,
    SetPriority,
    SetTimer,
    Settings,
    StepDown,
    Tick,
)
from mlx_cluster.cluster.election.journal import Journal, Words
from mlx_cluster.cluster.election.leading import Leading
from mlx_cluster.cluster.election.messages import (
    Append,
    AppendReply,
    Body,
    Dismissal,
    HandOver,
    Join,
    Message,
    RollCall,
    RollCallReply,
    VoteReply,
    VoteRequest,
)
from mlx_cluster.cluster.election.values import (
    NOTHING,
    Document,
    Durable,
    Version,
    anybody_on,
)


class Role(StrEnum):
    FOLLOWER = "follower"
    ASKING = "asking"  # for pre-votes: nothing has changed yet
    CANDIDATE = "candidate"
    LEADER = "leader"
    RETIRED = "retired"


class Election:
    """``start`` once, then ``step`` with every event; carry out the effects in order.

    ``chance`` is a fresh random number in [0, 1) for each call: it spreads the voters' time-outs. ``now`` is a
    monotonic clock that runs on while the machine sleeps (``clock.now``).
    """

    def __init__(self, durable: Durable, settings: Settings, priority: float = 0.5) -> None:
        self.cluster, self.voter, self.settings, self.priority = durable.cluster, durable.voter, settings, priority
        self.era, self.term, self.voted_for, self.document = (
            durable.era,
            durable.term,
            durable.voted_for,
            durable.document,
        )
        self.seen = dict(durable.seen)
        self.journal = Journal(durable)
        self._words: list[Words] = []  # of this step, that depend on the durable state

        self.role = Role.FOLLOWER
        self.leader: str | None = None
        self.leading: Leading | None = None
        self.committed: Document | None = None
        self._votes: set[str] = set()
        self._handed_over = False
        self._promised_to: str | None = None
        self._promise_ends = -math.inf
        self._abstains_until = -math.inf
        self._call_at = -math.inf
        self.probing: Command | None = None
        self.probe_ends = math.inf
        self._deadline = math.inf
        self._timer = math.inf
        self.now = 0.0
        self._chance = 0.0
        self.out: list[Effect] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            Tick: self._on_tick,
            Blind: self._on_blind,
            Message: self._on_message,
            Persisted: self._on_persisted,
            Knock: self._on_knock,
            SetPriority: self._on_priority,
        }
        self._bodies: dict[type, Callable[[Message, Any], None]] = {
            VoteRequest: self._on_vote_request,
            VoteReply: self._on_vote_reply,
            Append: self._on_append,
            AppendReply: self._on_append_reply,
            HandOver: self._on_hand_over,
            RollCall: self._on_roll_call,
            RollCallReply: self._on_roll_call_reply,
            Join: self._on_join,
            Dismissal: self._on_dismissal,
        }

    # -- what others may ask ---------------------------------------------------------------------

    @property
    def version(self) -> Version:
        return self.document.version if self.document else NOTHING

    @property
    def is_voter(self) -> bool:
        return self.document is not None and self.voter in self.document.voters

    @property
    def may_act(self) -> bool:
        """Leads, and the document has been committed in this term."""
        return self.leading is not None and self.leading.announced

    @property
    def is_idle(self) -> bool:
        """May act, and no write is under way: the next one may begin."""
        return self.may_act and self.committed is self.document and not (self.document and self.document.previous)

    def is_confirmed(self) -> bool:
        """Leads, and a majority has followed since this loop last woke late: what it believes about others is fresh."""
        if self.leading is None or self.document is None:
            return False
        return self.leading.promised_by_majority(self.document) >= self.leading.confirmed_since

    def answer(self, now: float) -> Document | None:
        """The committed document, when the lease says that nobody can have committed a newer one; else None.

        Authorises an answer, never an action: an action needs ``Propose`` and ``Committed``.
        """
        if not self.may_act or self.leading is None or self.document is None:
            return None
        valid = now < self.leading.promised_by_majority(self.document) + self._lease_seconds()
        return self.committed if valid else None

    # -- in ----------------------------------------------------------------------------------------

    def start(self, now: float, chance: float) -> tuple[Effect, ...]:
        """After a start a voter holds still for the shortest time-out: it has forgotten what it had promised, and the
        others may know of writes that its disk has lost."""
        self.now, self._chance = now, chance
        self._wait()
        if self._others():
            self._abstains_until = now + self._promise_seconds()
            self._call_the_roll()
        else:
            self._deadline = now
        return self._finish()

    def step(self, now: float, event: Event, chance: float) -> tuple[Effect, ...]:
        if self.role is Role.RETIRED:
            return ()
        self.now, self._chance = now, chance
        if now > self._timer + self.settings.late_seconds:
            self._woke_late()
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)
        else:
            operator.carry_out(self, event)  # type: ignore[arg-type]  # what has no handler is a Command
        return self._finish()

    def _on_tick(self, _: Tick) -> None:
        now = self.now
        if now >= self.probe_ends:
            operator.found_anew(self)
        if now < self._abstains_until:
            if now >= self._call_at:
                self._call_the_roll()
        elif self.leading is not None:
            self._lead_on(self.leading)
        elif now >= self._deadline:
            self._ask()

    def _on_blind(self, _: Blind) -> None:
        self._woke_late()
        self._on_tick(Tick())

    def _on_message(self, message: Message) -> None:
        if message.cluster != self.cluster or message.receiver not in (self.voter, anybody_on(self._node)):
            return
        body = message.body
        if message.era != self.era and not seats.era_passes(self, message):
            return
        if self.now < self._abstains_until and not isinstance(body, RollCall | RollCallReply):
            return
        if self.probing is not None and self.document and message.sender in self.document.everyone:
            operator.somebody_answers(self, message.sender)
        if message.sequence > self.seen.get(message.sender, 0):
            self.seen[message.sender] = message.sequence
        self._bodies[type(body)](message, body)

    def _on_persisted(self, event: Persisted) -> None:
        ready = self.journal.done(event.sequence)
        if ready is None:
            return
        for receiver, body, term in ready:
            self.send_now(receiver, body, term)
        if self.role is Role.CANDIDATE and self.journal.on_disk.term == self.term:
            self._count_vote(self.voter)
        elif self.leading is not None:
            self._commit_if_accepted(self.leading)

    def _on_knock(self, event: Knock) -> None:
        if not self.is_voter:
            for node in event.nodes:
                if node != self._node:
                    self.send_now(anybody_on(node), Join())

    def _on_priority(self, event: SetPriority) -> None:
        self.priority = min(1.0, max(0.0, event.priority))

    # -- standing ----------------------------------------------------------------------------------

    def _may_stand(self) -> bool:
        return self.is_voter and self.document is not None and self.voter not in self.document.witnesses

    def _ask(self) -> None:
        """A round of pre-votes: a term is only raised when a majority would vote for it."""
        self._wait()
        if not self._may_stand():
            return
        self.role, self.leader = Role.ASKING, None
        for voter in self._others():
            self.send_now(voter, VoteRequest(self.version, pre=True), self.term + 1)
        self._count_vote(self.voter)

    def _stand(self, handed_over: bool = False) -> None:
        self._enter_term(self.term + 1)
        self.role, self.leader, self.voted_for = Role.CANDIDATE, None, self.voter
        self._votes = set()  # its own counts once it is on the disk
        self._wait()
        for voter in self._others():
            self.send(voter, VoteRequest(self.version, pre=False, handed_over=handed_over))

    def _count_vote(self, voter: str) -> None:
        self._votes.add(voter)
        if self.document is None or not self.document.is_majority(self._votes):
            return
        if self.role is Role.ASKING:
            self._stand()
        elif self.role is Role.CANDIDATE:
            self._win()

    def _on_vote_request(self, message: Message, body: VoteRequest) -> None:
        sender, term = message.sender, message.term
        allowed = body.handed_over or self._is_free_for(sender)
        if body.pre:
            granted = allowed and term > self.term and self._is_as_new(body.version)
            newer = self.document if self.version > body.version else None
            self.send(sender, VoteReply(granted, True, newer), term if granted else self.term)
            return
        if term > self.term:
            if not allowed:
                return  # the leader in office is not dethroned by a higher number
            self._follow_term(term)
        granted = allowed and term == self.term and self._is_as_new(body.version) and self.voted_for in (None, sender)
        if granted and self.voted_for is None:
            self.voted_for, self.journal.changed = sender, True
            self.role = Role.FOLLOWER
            self._wait()
        newer = self.document if self.version > body.version else None
        self.send(sender, VoteReply(granted, False, newer))

    def _on_vote_reply(self, message: Message, body: VoteReply) -> None:
        if body.document is not None and self.leading is None and body.document.version > self.version:
            self._accept_handed(body.document)
        if body.pre and body.granted:
            if self.role is Role.ASKING and message.term == self.term + 1:
                self._count_vote(message.sender)
        elif message.term > self.term:
            self._follow_term(message.term)
        elif body.granted and self.role is Role.CANDIDATE and message.term == self.term:
            self._count_vote(message.sender)

    def _accept_handed(self, document: Document) -> None:
        """A newer document from who refused this voter: take it, and stand again soon with it."""
        if document.version.term > self.term:
            self._follow_term(document.version.term)
        self._take(document)
        if self.role is not Role.FOLLOWER:
            self.role = Role.FOLLOWER
            self._deadline = self.now + self.settings.heartbeat_seconds * self._chance

    def _is_as_new(self, version: Version) -> bool:
        return version >= self.version

    def _is_free_for(self, candidate: str) -> bool:
        """Whether no leader in office has this voter's promise (a leader has its own)."""
        if self.leading is not None:
            return False
        return candidate == self._promised_to or self.now >= self._promise_ends

    # -- following -----------------------------------------------------------------------------------

    def _on_append(self, message: Message, body: Append) -> None:
        if message.term < self.term or (self.leading is not None and message.term == self.term):
            self.send(message.sender, AppendReply(None, self.version))
            return
        if message.term > self.term:
            self._follow_term(message.term)
        self.role, self.leader = Role.FOLLOWER, message.sender
        self._promised_to = message.sender
        self._promise_ends = self.now + self._promise_seconds()
        self._wait()
        self._learn_commit(body.commit)
        if body.document is not None and body.document.version > self.version:
            self._take(body.document)
            self._learn_commit(body.commit)
        self.send(message.sender, AppendReply(body.sent_at, self.version))

    def _learn_commit(self, commit: Version) -> None:
        if self.document is not None and self.version == commit and self.committed is not self.document:
            self.committed = self.document
            self.out.append(Committed(self.document))

    def _on_hand_over(self, message: Message, _: HandOver) -> None:
        if message.term == self.term and self.leading is None and self._may_stand():
            self._stand(handed_over=True)

    # -- leading -------------------------------------------------------------------------------------

    def _win(self) -> None:
        assert self.document is not None
        self.role, self.leader = Role.LEADER, self.voter
        self.leading = Leading(self.voter, self.document, self.now)
        self.write(self.document.next(self.term))  # what an earlier term left counts only once this term has it too

    def write(self, document: Document) -> None:
        """Begin to replicate the next document. The caller has seen to it that none is under way."""
        assert self.leading is not None
        self._take(document)
        self.leading.follow(document, self.now)
        self._broadcast(self.leading)

    def _broadcast(self, leading: Leading) -> None:
        assert self.document is not None
        commit = self.committed.version if self.committed else NOTHING
        beat, full = Append(self.now, commit), Append(self.now, commit, self.document)
        for voter, peer in leading.peers.items():
            self.send_now(voter, beat if peer.accepted == self.version else full)
        leading.heartbeat_at = self.now + self.settings.heartbeat_seconds

    def _lead_on(self, leading: Leading) -> None:
        assert self.document is not None
        if leading.heard_by_majority(self.document) < self.now - self.settings.timeout_max_seconds:
            self.step_down(f"no majority has answered for {self.settings.timeout_max_seconds} s")
        elif self.now >= leading.heartbeat_at:
            self._broadcast(leading)

    def _on_append_reply(self, message: Message, body: AppendReply) -> None:
        if self.leading is None:
            return
        if message.term > self.term:
            if message.sender in self.leading.peers:
                self._follow_term(message.term)
                # That voter cannot follow a lower term. The others still wait for this leader, so it stands again at
                # once, and does not let that voter pass while it does.
                self._promised_to, self._promise_ends = self.voter, self.now + self.settings.heartbeat_seconds
                self._deadline = self.now
        elif message.term == self.term:
            self.leading.replied(message.sender, body.accepted, body.sent_at, self.now)
            self._commit_if_accepted(self.leading)

    def _commit_if_accepted(self, leading: Leading) -> None:
        document = self.document
        if document is None or self.committed is document:
            return
        accepted = leading.accepted(document.version)
        if self.journal.on_disk.document is document:
            accepted.add(self.voter)
        if not document.is_majority(accepted):
            return
        self.committed = document
        self.out.append(Committed(document))
        if not leading.announced:
            leading.announced = True
            self.out.append(BecomeLeader(self.term))
        if document.previous:
            self.write(document.next(self.term, previous=()))
        else:
            self._broadcast(leading)

    def step_down(self, reason: str) -> None:
        if self.leading is None:
            return
        self.leading, self.role, self.leader = None, Role.FOLLOWER, None
        self.out.append(StepDown(self.term, reason))
        self._wait()

    # -- in and out of the voter set: see ``seats`` --------------------------------------------------------

    def _on_join(self, message: Message, _: Join) -> None:
        seats.asks_to_join(self, message.sender)

    def _on_dismissal(self, _message: Message, _: Dismissal) -> None:
        if not self.is_voter:
            self.retire("this voter id has been removed from the cluster")

    def _call_the_roll(self) -> None:
        for voter in self._others():
            self.send_now(voter, RollCall())
        self._call_at = self.now + self.settings.heartbeat_seconds

    def _on_roll_call(self, message: Message, _: RollCall) -> None:
        self.send_now(message.sender, RollCallReply(self.seen.get(message.sender, 0)))

    def _on_roll_call_reply(self, message: Message, body: RollCallReply) -> None:
        last = self.journal.on_disk.sequence
        if body.seen > last:
            self.retire(
                f"{message.sender} has heard of write {body.seen}, this disk ends at {last}: it went back in time"
            )

    def retire(self, reason: str) -> None:
        self.step_down(reason)
        self.role = Role.RETIRED
        self.out.append(Retire(reason))

    # -- durable state, timers, sending ------------------------------------------------------------------

    def _enter_term(self, term: int) -> None:
        self.term, self.voted_for, self.journal.changed = term, None, True
        self.journal.forget_words()  # nothing said in an earlier term is worth saying any more

    def _follow_term(self, term: int) -> None:
        self.step_down(f"term {term} has begun")
        self._enter_term(term)
        self.role, self.leader = Role.FOLLOWER, None

    def _take(self, document: Document) -> None:
        self.document = document
        self.journal.changed = True

    def adopt(self, document: Document, term: int) -> None:
        """A document that nobody has voted on: the first one, or a forced one. Founding only."""
        self._enter_term(term)
        self._take(document)
        self.role, self.leader = Role.FOLLOWER, None
        self._deadline = self.now

    def refuse(self, command: Command, reason: str) -> None:
        self.out.append(Refused(command, reason))

    @property
    def _node(self) -> str:
        return self.voter.rpartition(":")[0]

    def _others(self) -> list[str]:
        return [v for v in self.document.everyone if v != self.voter] if self.document else []

    def _lease_seconds(self) -> float:
        return self.settings.lease_seconds

    def _promise_seconds(self) -> float:
        return self.settings.timeout_min_seconds

    def _wait(self) -> None:
        self._deadline = self.now + self.settings.delay_seconds(self.priority, self._chance)

    def _woke_late(self) -> None:
        """Time has passed unseen: what the timers would say now is about this process, not about the others."""
        if self.probing is not None:
            self.probe_ends = self.now + 2 * self.settings.timeout_max_seconds
        if self.leading is not None:
            self.leading.woke_late(self.now)
            return
        if self.role is not Role.FOLLOWER:
            self.role = Role.FOLLOWER
        self._wait()

    def send(self, receiver: str, body: Body, term: int | None = None) -> None:
        """Once the state as of the end of this step is on the disk."""
        self._words.append((receiver, body, self.term if term is None else term))

    def send_now(self, receiver: str, body: Body, term: int | None = None) -> None:
        """At once: for what says nothing about this voter's own disk."""
        said = self.term if term is None else term
        self.out.append(
            Send(Message(self.cluster, self.era, self.voter, receiver, said, self.journal.on_disk.sequence, body))
        )

    def _must_wait_for_disk(self) -> bool:
        return not self.journal.is_quiet

    def _finish(self) -> tuple[Effect, ...]:
        if self.journal.wants_to_write and self.role is not Role.RETIRED:
            self._write_down()
        if self._words:
            if self._must_wait_for_disk():
                self.journal.hold(self._words)
            else:
                for receiver, body, term in self._words:
                    self.send_now(receiver, body, term)
            self._words = []
        timer = self._next_timer()
        if timer != self._timer:
            self._timer = timer
            self.out.append(SetTimer(timer))
        out, self.out = tuple(self.out), []
        return out

    def _write_down(self) -> None:
        voters = self.document.everyone if self.document else tuple(self.seen)
        durable = Durable(
            cluster=self.cluster,
            voter=self.voter,
            era=self.era,
            term=self.term,
            voted_for=self.voted_for,
            document=self.document,
            sequence=self.journal.on_disk.sequence + 1,
            seen=tuple((v, self.seen[v]) for v in voters if v in self.seen),
        )
        self.journal.begin(durable)
        self.out.append(Persist(durable))

    def _next_timer(self) -> float:
        if self.role is Role.RETIRED:
            return math.inf
        at = self.leading.heartbeat_at if self.leading is not None else self._deadline
        if self.now < self._abstains_until:
            at = min(at, self._call_at)
        return min(at, self.probe_ends)
