"""Whose word counts on this node: the elected coordinator and its committed documents, or a fixed one.

Owns: the seam ``Authority`` and its two fillings; the first founding, priorities, hand-overs and the pin.
Does not own: the election itself (``cluster.voting``), what a coordinator decides (``cluster.coordinator``).
Invariant: a document reaches ``on_document`` only when it is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from mlx_cluster import log
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.election.events import (
    BecomeLeader,
    Bootstrap,
    Command,
    Committed,
    ForceNewCluster,
    Propose,
    RemoveVoter,
    Retire,
    Settings,
    StepDown,
    TransferTo,
)
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.strategy import Candidate, HandOvers, Pin, Strategy, priorities
from mlx_cluster.cluster.election.values import Document, Era, node_of
from mlx_cluster.cluster.founding import found
from mlx_cluster.cluster.leader import FixedNode, Leadership
from mlx_cluster.cluster.membership import ClusterView
from mlx_cluster.cluster.post import VotePost
from mlx_cluster.cluster.voter import News, Standing
from mlx_cluster.cluster.voting import VotingThread
from mlx_cluster.config.names import find_node
from mlx_cluster.config.schema import CoordinatorSection
from mlx_cluster.config.schema import Settings as ClusterSettings
from mlx_cluster.errors import ClusterError
from mlx_cluster.node.history import History
from mlx_cluster.node.identity import Identity

ALIVE_SECONDS = 0.2  # how often the loop says that it takes messages in
HAND_OVER_SECONDS = 0.5  # what an orderly stop gives the coordinator to name a successor
WITNESS = "witness"  # the witness's name in voter ids; nodes have numbers

_log = log.get(__name__)


class Authority(Protocol):
    """Made by ``choose``; all of it is called in the event loop."""

    @property
    def voter(self) -> str: ...

    @property
    def founded(self) -> bool: ...

    @property
    def backs(self) -> str: ...

    def start(self) -> None: ...

    async def stop(self) -> None: ...

    def observe(self, view: ClusterView, document: ClusterDocument) -> Leadership:
        """Look at the table once per heartbeat; the returned leadership holds until the next call."""
        ...

    def waiting(self) -> str:
        """Why the coordinator must not decide anything at this moment; "" when it may."""
        ...

    def commit(self, document: ClusterDocument) -> None:
        """Have a document take effect; it comes back through ``on_document`` when it has, and may never do so."""
        ...

    def tells(self, voter: str) -> bool:
        """Whether the owner of this voter id must be sent documents, because they do not reach it by themselves."""
        ...

    def hear(self, message: Message) -> None: ...

    async def force_new_cluster(self) -> str:
        """Go on alone after quorum was lost for good: "" when this node leads a new era, or why not."""
        ...

    def voter_of(self, node_id: int) -> str | None:
        """The id under which this node votes, as this node knows; None when it has no vote."""
        ...

    async def remove_voter(self, voter: str) -> str:
        """Begin to take a vote away for good: "" when it has begun, or why not."""
        ...

    def report(self, view: ClusterView) -> dict[str, Any]:
        """For the operator: mode, voters, quorum, and why things are as they are."""
        ...


class FixedAuthority:
    """One node leads by configuration; its documents take effect when it has remembered them."""

    voter = backs = ""
    founded = False

    def __init__(self, self_id: int, fixed_id: int, term: int, on_document: Callable[[ClusterDocument], None]) -> None:
        self._self_id, self._fixed_id = self_id, fixed_id
        self._choice, self._on_document = FixedNode(self_id, fixed_id, term), on_document
        self._leadership = Leadership(None, term)

    def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def observe(self, view: ClusterView, document: ClusterDocument) -> Leadership:
        self._leadership = self._choice.observe(view)
        return self._leadership

    def waiting(self) -> str:
        return ""

    def commit(self, document: ClusterDocument) -> None:
        self._on_document(document)

    def tells(self, voter: str) -> bool:
        return True

    def hear(self, message: Message) -> None:
        _log.debug("a vote reached a node with a fixed coordinator", sender=message.sender)

    async def force_new_cluster(self) -> str:
        return "the coordinator is fixed by coordinator.fixed: change it there, on every node"

    def voter_of(self, node_id: int) -> str | None:
        return None

    async def remove_voter(self, voter: str) -> str:
        return "the coordinator is fixed by coordinator.fixed: nobody votes"

    def report(self, view: ClusterView) -> dict[str, Any]:
        leads = self._leadership.node_id is not None
        return {
            "mode": "fixed",
            "has_quorum": leads,
            "detail": "" if leads else f"{view.name_of(self._fixed_id)} does not answer: {NO_QUORUM}",
            "voters": [],
        }


NO_QUORUM = "what serves goes on serving, nothing is planned anew"


class ElectedAuthority:
    """Votes in a thread of its own; ``on_document`` is called with every committed document, in order."""

    def __init__(
        self,
        identity: Identity,
        settings: ClusterSettings,
        history: History,
        *,
        on_document: Callable[[ClusterDocument], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
        max_stale_seconds: float,
        dial: Callable[[str], str],
    ) -> None:
        self._cluster, self._section, self._history = settings.cluster.name, settings.coordinator, history
        self._on_document, self._on_change, self._clock = on_document, on_change, clock
        self._started = clock()
        addresses = {str(node_id): address for node_id, address in identity.peers.items()}
        if settings.cluster.witness is not None:
            addresses[WITNESS] = f"{settings.cluster.witness.host}:{settings.cluster.witness.port}"
        timing = timing_of(self._section)
        self._timing = timing
        self._thread = VotingThread(
            identity.state_dir,
            str(identity.node_id),
            timing,
            cluster=settings.cluster.name,
            nodes=addresses,
            witnesses=(WITNESS,),
            make_post=lambda: VotePost(addresses, settings.cluster.name, timing.timeout_min_seconds, dial),
            on_news=self._on_news,
            on_standing=self._on_standing,
            max_stale_seconds=max_stale_seconds,
        )
        self._standing = self._thread.standing
        self._committed: Document | None = None
        self._strategy: Strategy = self._section.election_strategy
        self._hand_overs = HandOvers(self._strategy)
        self._view: ClusterView | None = None
        self._pin: Pin | None = None
        self._backs, self._waiting_to_found = "", ""
        self._founding: tuple[str, ...] = ()
        self._proposing = False
        self._led_before: tuple[int, int] | None = None  # (node id, term) of the last coordinator that was seen
        self._leaderless_since: float | None = self._started
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def voter(self) -> str:
        return self._standing.voter

    @property
    def founded(self) -> bool:
        return self._standing.founded

    @property
    def backs(self) -> str:
        return self._backs

    def start(self) -> None:
        self._thread.start()
        self._spawn(self._stay_alive())

    async def stop(self) -> None:
        """Name a successor, so that the others need not notice the loss of their coordinator; then fall silent."""
        if self._standing.may_act and self._view is not None:
            with contextlib.suppress(ClusterError):
                await self._hand_over_at_once()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.to_thread(self._thread.stop)

    # -- once per heartbeat ------------------------------------------------------------------------------

    def observe(self, view: ClusterView, document: ClusterDocument) -> Leadership:
        now = self._clock()
        self._view = view
        left = document.pin.expires_at - time.time() if document.pin and document.pin.expires_at else None
        self._pin = Pin(str(document.pin.node_id), None if left is None else now + left) if document.pin else None
        self._found_if_due(view, now)
        leadership = self._leadership(view)
        self._note_leader(view, leadership, now)
        self._prefer(view, document, leadership, now)
        return leadership

    def _found_if_due(self, view: ClusterView, now: float) -> None:
        if self._standing.founded:
            self._backs = self._waiting_to_found = ""
            return
        founding = found(view, self.voter, now - self._started)
        self._backs, self._waiting_to_found = founding.backs, founding.waiting
        if founding.voters:
            if founding.voters != self._founding:
                self._founding = founding.voters
                self._history.note("cluster_founded", voters=list(founding.voters))
            self._order(Bootstrap(founding.voters, ClusterDocument(self._cluster).to_body()))

    def _leadership(self, view: ClusterView) -> Leadership:
        """A leader that may act, one that this voter follows, or, without a vote, the one that names itself."""
        standing = self._standing
        own = view.self_id
        if standing.may_act:
            return Leadership(own, standing.term)
        if standing.leader is not None and standing.leader != standing.voter and standing.has_quorum:
            node = node_of(standing.leader)
            return Leadership(int(node) if node.isdigit() else None, standing.term)
        if not standing.is_voter:
            claims = [(s.document[0], s.term, s.node_id) for s in view.living if s.leader == s.node_id != own]
            if claims:
                _, term, node_id = max(claims)
                return Leadership(node_id, term)
        return Leadership(None, standing.term)

    def _note_leader(self, view: ClusterView, leadership: Leadership, now: float) -> None:
        if leadership.node_id is None:
            if self._leaderless_since is None:
                self._leaderless_since = now
                lost = self._led_before
                name = view.name_of(lost[0]) if lost else ""
                self._history.note("coordinator_lost", node=name, term=leadership.term)
            return
        seen = (leadership.node_id, leadership.term)
        if seen != self._led_before:
            since = self._leaderless_since
            self._history.elected(
                leadership.node_id,
                view.name_of(leadership.node_id),
                leadership.term,
                None if since is None or self._led_before is None else round(now - since, 3),
                self._why(view, leadership),
            )
            self._led_before = seen
        self._leaderless_since = None

    def _why(self, view: ClusterView, leadership: Leadership) -> str:
        before = self._led_before
        if self._pin is not None and self._pin.node == str(leadership.node_id):
            return "the operator has set it"
        if before is None:
            return "in office when this node came, or the first one elected since"
        name = view.name_of(before[0])
        if before[0] == leadership.node_id:
            return f"elected again after term {before[1]}"
        node = view.node(before[0])
        if node is not None and node.status is not None and node.status.leaving:
            return f"elected after {name}, which has left"
        silent = f", last heard of {node.silent_seconds:.1f} s before" if node is not None else ""
        return f"elected after {name}{silent} ({self._strategy})"

    def _prefer(self, view: ClusterView, document: ClusterDocument, leadership: Leadership, now: float) -> None:
        """Stand earlier or later by the strategy; hand over when another voter has been better for long enough."""
        candidates = self._candidates(view, document)
        leader = None if leadership.node_id is None else str(leadership.node_id)
        ranked = priorities(self._strategy, candidates, leader, self._pin, now)
        own = str(view.self_id)
        self._thread.prefer(ranked.get(own, 0.0))
        if not self._standing.may_act:
            self._hand_overs.stopped()
        elif (node := self._hand_overs.observe(own, candidates, self._pin, now)) is not None:
            self._transfer_to(node)

    def _candidates(self, view: ClusterView, document: ClusterDocument) -> list[Candidate]:
        """Living voters that may lead; a drained node is asked only when nobody else is there."""
        standing = self._standing
        may_lead = {node_of(v) for v in standing.voters if v not in standing.witnesses}
        living = [n.status for n in view.nodes if n.state == "alive" and n.status is not None]
        able = [s for s in living if str(s.node_id) in may_lead]
        fit = [s for s in able if s.node_id not in document.drained] or able
        return [Candidate(str(s.node_id), s.health, s.load) for s in fit]

    def _transfer_to(self, node: str) -> None:
        voter = next((v for v in self._standing.voters if node_of(v) == node), None)
        if voter is not None:
            _log.info("coordinator hands over", to=node, strategy=self._strategy)
            self._order(TransferTo(voter))

    async def _hand_over_at_once(self) -> None:
        assert self._view is not None
        able = [n for n in self._standing.heard if n not in self._standing.witnesses and n != self.voter]
        alive = {str(n.node_id) for n in self._view.nodes if n.state == "alive"}
        for voter in (v for v in able if node_of(v) in alive):
            if not await self._thread.order(TransferTo(voter), HAND_OVER_SECONDS):
                await asyncio.sleep(0.05)  # the request must leave before the channels close
                return

    # -- documents ---------------------------------------------------------------------------------------

    def waiting(self) -> str:
        if not self._standing.may_act:
            return "this node does not lead"
        if not self._standing.is_confirmed:
            return "a majority has to answer first: this node has just been away"
        if self._proposing or not self._standing.is_idle:
            return "a document is being written"
        return ""

    def commit(self, document: ClusterDocument) -> None:
        if self._committed is not None and not self._proposing:
            self._proposing = True
            self._order(Propose(document.to_body(), self._committed.version))

    def tells(self, voter: str) -> bool:
        return voter not in self._standing.voters

    def hear(self, message: Message) -> None:
        self._thread.hear(message)

    async def force_new_cluster(self) -> str:
        """See ``Authority``. Raises ``DeadlineExceeded``."""
        seconds = 4 * self._timing.timeout_max_seconds + 5.0
        return await self._thread.order(ForceNewCluster(), seconds)

    def voter_of(self, node_id: int) -> str | None:
        return next((voter for voter in self._standing.voters if node_of(voter) == str(node_id)), None)

    async def remove_voter(self, voter: str) -> str:
        """See ``Authority``. Raises ``DeadlineExceeded``, ``Unavailable``."""
        if voter in self._standing.heard:
            return f"{voter} still answers: stop that node first"
        return await self._thread.order(RemoveVoter(voter))

    # -- what the voter tells -------------------------------------------------------------------------------

    def _on_standing(self, standing: Standing) -> None:
        before, self._standing = self._standing, standing
        if standing.has_quorum != before.has_quorum and standing.founded:
            self._history.note("quorum_regained" if standing.has_quorum else "quorum_lost", term=standing.term)
        if standing.voters != before.voters and standing.founded:
            self._history.note("voters_changed", voters=list(standing.voters), witnesses=list(standing.witnesses))
        if (standing.leader, standing.may_act, standing.voter) != (before.leader, before.may_act, before.voter):
            self._on_change()

    def _on_news(self, news: News, era: Era) -> None:
        match news:
            case Committed(document):
                self._committed = document
                rank = (era.number, document.version.term, document.version.index)
                self._on_document(ClusterDocument.from_body(document.body, rank))
            case BecomeLeader(term):
                _log.info("this node leads", term=term)
            case StepDown(term, reason):
                _log.info("this node no longer leads", term=term, reason=reason)
            case Retire(reason):
                self._committed = None
                self._history.note("voter_retired", reason=reason)
        self._on_change()

    # -- for the operator ------------------------------------------------------------------------------------

    def report(self, view: ClusterView) -> dict[str, Any]:
        standing = self._standing
        return {
            "mode": "elected",
            "strategy": self._strategy,
            "era": standing.era.number,
            "role": str(standing.role),
            "has_quorum": standing.has_quorum,
            "detail": self._detail(view),
            "voters": [
                {
                    "voter": voter,
                    "name": voter_name(voter, view),
                    "witness": voter in standing.witnesses,
                    "heard": voter in standing.heard if standing.may_act else None,
                }
                for voter in standing.voters
            ],
        }

    def _detail(self, view: ClusterView) -> str:
        standing = self._standing
        if not standing.founded:
            return self._waiting_to_found
        if standing.has_quorum:
            return ""
        if not standing.is_voter:
            return "this node has no vote yet"
        voters = standing.voters
        alive = {str(n.node_id) for n in view.nodes if n.state != "dead"}
        silent = [voter_name(v, view) for v in voters if node_of(v) not in alive and node_of(v) != WITNESS]
        lacks = f" ({', '.join(silent)} silent)" if silent else ""
        return f"no coordinator: {len(voters) // 2 + 1} of {len(voters)} voters must agree{lacks}; {NO_QUORUM}"

    # -- inside ----------------------------------------------------------------------------------------------

    def _order(self, command: Command) -> None:
        self._spawn(self._carry_out(command))

    async def _carry_out(self, command: Command) -> None:
        try:
            refusal = await self._thread.order(command)
        except ClusterError as error:
            refusal = str(error)
        if isinstance(command, Propose):
            self._proposing = False
        if refusal:
            _log.debug("the voter refuses", command=type(command).__name__, reason=refusal)

    async def _stay_alive(self) -> None:
        while True:
            self._thread.is_alive()
            await asyncio.sleep(ALIVE_SECONDS)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def voter_name(voter: str, view: ClusterView) -> str:
    node = node_of(voter)
    return view.name_of(int(node)) if node.isdigit() else node


def timing_of(section: CoordinatorSection) -> Settings:
    """Three heartbeats fit the shortest time-out, so that two may be lost."""
    return Settings(
        heartbeat_seconds=section.election_timeout_min / 3,
        timeout_min_seconds=section.election_timeout_min,
        timeout_max_seconds=section.election_timeout_max,
    )


def choose(
    identity: Identity,
    settings: ClusterSettings,
    history: History,
    term: int,
    *,
    on_document: Callable[[ClusterDocument], None],
    on_change: Callable[[], None],
    clock: Callable[[], float],
    max_stale_seconds: float,
    dial: Callable[[str], str],
) -> Authority:
    """As ``coordinator.fixed`` says; ``dial`` turns a node's known address into the one to dial now.

    Raises ``ConfigError`` for a node that is not there.
    """
    if settings.coordinator.fixed is not None:
        fixed = find_node(settings, settings.coordinator.fixed)
        return FixedAuthority(identity.node_id, fixed.node_id, term, on_document)
    return ElectedAuthority(
        identity,
        settings,
        history,
        on_document=on_document,
        on_change=on_change,
        clock=clock,
        max_stale_seconds=max_stale_seconds,
        dial=dial,
    )
