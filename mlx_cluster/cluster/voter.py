"""One voter of this node, from life to life: the election with its effects carried out.

Owns: the ``Election`` and its replacement when an id retires, knocking for a seat, who is given one, answers to
commands. Pure but for its ``Surroundings``: time and randomness are arguments.
Does not own: threads, clock, disk and network (``voting``), nor what a coordinator decides.
Invariant: an id that retired is never used again; word of a finished write counts only for the id that began it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mlx_cluster.cluster import stable
from mlx_cluster.cluster.election.events import (
    AddVoter,
    BecomeLeader,
    Blind,
    Command,
    Committed,
    Event,
    ForceNewCluster,
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
from mlx_cluster.cluster.election.machine import Election, Role
from mlx_cluster.cluster.election.messages import Join, Message
from mlx_cluster.cluster.election.values import BLANK, Durable, Era, node_of

KNOCK_SECONDS = 1.0
MAX_VOTERS = 7  # more of them make a majority slower and no safer; further nodes are told what was decided

News = BecomeLeader | StepDown | Committed | Retire


class Surroundings(Protocol):
    """What a voter needs done. ``write`` answers later through ``Voter.written``; ``send`` may lose messages."""

    def send(self, message: Message) -> None: ...

    def write(self, durable: Durable) -> None: ...

    def tell(self, news: News, era: Era) -> None: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """What a voter believes at one moment. ``heard`` are the voters that a leader has heard of late, itself included.

    ``has_quorum``: it leads with a majority, or follows a leader that it has heard of late.
    """

    voter: str
    role: Role = Role.FOLLOWER
    era: Era = BLANK
    term: int = 0
    leader: str | None = None
    may_act: bool = False
    is_confirmed: bool = False
    is_idle: bool = False
    is_voter: bool = False
    founded: bool = False
    has_quorum: bool = False
    voters: tuple[str, ...] = ()
    witnesses: tuple[str, ...] = ()
    heard: tuple[str, ...] = ()


class Voter:
    """``nodes`` are the other nodes that may hold a seat, by the names in voter ids; ``witnesses`` those of them that
    only vote. ``fresh`` draws the disk part of a new id, ``chance`` a number in [0, 1).
    """

    def __init__(
        self,
        node: str,
        durable: Durable | stable.LostDisk,
        settings: Settings,
        surroundings: Surroundings,
        *,
        cluster: str,
        nodes: Iterable[str],
        witnesses: Iterable[str] = (),
        fresh: Callable[[], str],
        chance: Callable[[], float],
    ) -> None:
        self._node, self._cluster, self._settings = node, cluster, settings
        self._surroundings, self._fresh, self._chance = surroundings, fresh, chance
        self._nodes, self._witnesses = tuple(nodes), frozenset(witnesses)
        self._is_new = isinstance(durable, stable.LostDisk)
        self._election = Election(self._blank() if isinstance(durable, stable.LostDisk) else durable, settings)
        self._timer = math.inf
        self._knock_at = -math.inf
        self._heard_leader = -math.inf
        self._now = 0.0
        self._forcing: list[Callable[[str], None]] = []

    # -- in --------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        if self._is_new:
            self._surroundings.write(self._election.journal.on_disk)  # the id is the same after a crash in a moment
        self._now = now
        self._carry_out(self._election.start(now, self._chance()))

    @property
    def timer(self) -> float:
        """When ``wake`` is due."""
        return min(self._timer, math.inf if self._election.is_voter else self._knock_at)

    def wake(self, now: float, *, blind: bool) -> None:
        """The timer is due. ``blind``: what others say is held up before it gets here."""
        if now >= self._knock_at and not self._election.is_voter:
            self._knock_at = now + KNOCK_SECONDS
            self._step(Knock(self._nodes), now)
        if now >= self._timer:
            self._step(Blind() if blind else Tick(), now)

    def hear(self, message: Message, now: float) -> None:
        self._step(message, now)
        if isinstance(message.body, Join):
            self._consider(message.sender, now)
        elif message.sender == self._election.leader:
            self._heard_leader = now

    def written(self, durable: Durable, now: float) -> None:
        """This state is on the disk for good."""
        if durable.voter == self._election.voter:
            self._step(Persisted(durable.sequence), now)

    def prefer(self, priority: float, now: float) -> None:
        """0…1: how early to stand when there is no leader."""
        if priority != self._election.priority:
            self._step(SetPriority(priority), now)

    def order(self, command: Command, now: float, answer: Callable[[str], None]) -> None:
        """Carry out a command; ``answer`` hears why it was refused, or "" once it has begun.

        A forced founding answers when it is decided.
        """
        if isinstance(command, ForceNewCluster) and self._election.probing is not None:
            answer("another one is asking the other voters already")
            return
        self._step(command, now, answer)

    def standing(self) -> Standing:
        election, document, leading = self._election, self._election.document, self._election.leading
        since = self._now - self._settings.timeout_max_seconds
        heard = (election.voter, *(v for v, p in leading.peers.items() if p.heard >= since)) if leading else ()
        follows = election.leader is not None and self._heard_leader >= since
        return Standing(
            voter=election.voter,
            role=election.role,
            era=election.era,
            term=election.term,
            leader=election.leader,
            may_act=election.may_act,
            is_confirmed=election.is_confirmed(),
            is_idle=election.is_idle,
            is_voter=election.is_voter,
            founded=document is not None,
            has_quorum=election.may_act if leading is not None else follows,
            voters=document.voters if document else (),
            witnesses=document.witnesses if document else (),
            heard=heard,
        )

    # -- inside ----------------------------------------------------------------------------------------

    def _step(self, event: Event, now: float, answer: Callable[[str], None] | None = None) -> None:
        self._now = now
        refusal = self._carry_out(self._election.step(now, event, self._chance()))
        if answer is None:
            pass
        elif isinstance(event, ForceNewCluster) and refusal is None:
            self._forcing.append(answer)
        else:
            answer(refusal or "")

    def _carry_out(self, effects: Iterable[object]) -> str | None:
        """Do what the election asks for, in order; the reason when it has refused a command."""
        refusal: str | None = None
        for effect in effects:
            match effect:
                case Send(message):
                    self._surroundings.send(message)
                case Persist(durable):
                    self._surroundings.write(durable)
                case SetTimer(at):
                    self._timer = at
                case Refused(command, reason):
                    refusal = reason
                    if isinstance(command, ForceNewCluster):
                        self._end_forcing(reason)
                case BecomeLeader():
                    self._end_forcing("")
                    self._surroundings.tell(effect, self._election.era)
                case StepDown() | Committed():
                    self._surroundings.tell(effect, self._election.era)
                case Retire(reason):
                    self._end_forcing(reason)
                    self._surroundings.tell(effect, self._election.era)
                    self._begin_anew()
        return refusal

    def _begin_anew(self) -> None:
        """Under a new id, with nothing remembered; the old state is overwritten at once, so that it stays retired."""
        self._election = Election(self._blank(), self._settings, self._election.priority)
        self._timer, self._heard_leader = math.inf, -math.inf
        self._surroundings.write(self._election.journal.on_disk)
        self._carry_out(self._election.start(self._now, self._chance()))
        self._knock_at = self._now

    def _blank(self) -> Durable:
        return stable.blank(self._cluster, self._node, self._fresh())

    def _end_forcing(self, reason: str) -> None:
        waiting, self._forcing = self._forcing, []
        for answer in waiting:
            answer(reason)

    def _consider(self, joiner: str, now: float) -> None:
        """Give a configured node that has never had a seat one, as long as seats are left."""
        election, document, node = self._election, self._election.document, node_of(joiner)
        if document is None or not election.is_idle or node not in self._nodes or joiner in document.retired:
            return
        taken = {node_of(v) for v in (*document.voters, *document.vacant)}
        if node not in taken and (len(document.voters) < MAX_VOTERS or node in self._witnesses):
            self._step(AddVoter(joiner, node in self._witnesses), now)
