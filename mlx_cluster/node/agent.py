"""The agent of a node: it hears the others, follows the cluster document, and answers the other agents.

Owns: the heartbeat of decisions (table → leader → coordinator → document), and convergence on the document in force.
Does not own: the decisions themselves (``cluster``), ports and HTTP (``servers``), processes (``stages``), bring-up
(``drivers``).
Invariant: nothing is started before a coordinator of this boot has confirmed the document; a stage that the document
does not name is not started, and one that it no longer names is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from mlx_cluster import log
from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.addresses import DialledAddresses, RankedAddresses
from mlx_cluster.cluster.coordinator import Coordinator, available_bytes, push
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import ClusterView, Membership
from mlx_cluster.cluster.rpc import HeartbeatThread
from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ClusterError, Fenced
from mlx_cluster.metrics import Metrics
from mlx_cluster.node import authority, machine
from mlx_cluster.node.bringup import EngineMaker, PipelineDriver, StageAgent, Timing
from mlx_cluster.node.drivers import Drivers
from mlx_cluster.node.history import History
from mlx_cluster.node.identity import Identity, ipv4_of
from mlx_cluster.node.leases import PortLeases
from mlx_cluster.node.models import LocalModels
from mlx_cluster.node.peers import OwnAgent, Peers
from mlx_cluster.node.placer import ClusterPlacer, with_transport
from mlx_cluster.node.recoveries import PipelineWatch
from mlx_cluster.node.round_trips import RoundTripProbe
from mlx_cluster.node.specs import StageSpecs
from mlx_cluster.node.stages import StageHost, StageStarter
from mlx_cluster.node.state import NodeState
from mlx_cluster.node.vanished import RefusalProbe
from mlx_cluster.node.watch import NodeWatch
from mlx_cluster.node.word import OwnWord, Voice
from mlx_cluster.plan import Epoch, Plan

DOCUMENT_WAIT_SECONDS = 10.0  # a driver may know a document a moment before the others
SHORTEST_BEAT_SECONDS = 0.05  # however much happens, decisions are this far apart
DRAIN_POLL_SECONDS = 0.1
STALE_HEARTBEATS = 10  # an event loop that was silent for so many intervals is frozen: its node must look dead

_log = log.get(__name__)


class Agent:
    """One per process, made inside the event loop. ``run`` beats until it is cancelled.

    ``hints`` gives further addresses at which a node, by its id, may be dialled.
    """

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        models: LocalModels,
        *,
        start_process: StageStarter,
        make_engine: EngineMaker,
        timing: Timing,
        speed_bytes_per_second: float = 0.0,
        hints: Callable[[int], Sequence[str]] = lambda _: (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.identity, self.models = settings, identity, models
        self._make_engine, self._timing, self._clock = make_engine, timing, clock
        self._version = machine.versions()
        self._started = clock()
        self.metrics = Metrics()
        self.history = History(self.metrics.cluster)
        section = settings.coordinator
        self._interval = section.heartbeat_interval
        self.state = NodeState(identity.state_dir, settings.cluster.name)
        self._membership = Membership(
            identity.node_id, identity.members, self._version, self._interval, section.failure_threshold, self._started
        )
        self.addresses = DialledAddresses(
            {i: RankedAddresses(known, identity.other_addresses.get(i, ())) for i, known in identity.peers.items()}
        )
        self.authority = authority.choose(
            identity,
            settings,
            self.history,
            self.state.document.term,
            on_document=self._take_committed,
            on_change=self._office_changed,
            clock=clock,
            max_stale_seconds=STALE_HEARTBEATS * self._interval,
            dial=self.addresses.instead_of,
        )
        self._leadership = Leadership(None, self.state.document.term)
        self._coordinator = Coordinator(
            settings.models,
            ClusterPlacer(settings),
            settings.network.transport,
            self._started,
            quiet_seconds=section.quiet_period,
        )
        self._unplaced: tuple[tuple[str, str], ...] = ()
        self._word = OwnWord(settings, identity, self._version)
        self._word.speed_bytes_per_second = speed_bytes_per_second
        self._leaving = self._draining = False
        self._specs = StageSpecs(settings, identity, models, self._stage_port, self._room)
        self.stages = StageHost(
            self.state,
            self._specs.make,
            start_process,
            PortLeases(*settings.network.mlx_port_range),
            advertised_host=identity.host,
            mlx_host=ipv4_of(identity.host),
            link_timeout_seconds=settings.network.connect_timeout,
            on_change=self._change,
            kv_budget=self._specs.kv_budget,
        )
        self.drivers = Drivers(self._make_driver)
        names = {m.node_id: m.name for m in identity.members}
        self.peers = Peers(settings.cluster.name, self.addresses, names, self.history.circuit)
        self._round_trips = RoundTripProbe(self.addresses, names, section.health_check_interval, hints=hints)
        self._confirmed = False
        self._converge_needed = asyncio.Event()
        self._document_changed = asyncio.Condition()
        self._change_pending = False
        self._watch = NodeWatch(self.history, self.metrics.cluster)
        self.pipeline_watch = PipelineWatch(self.history)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._heartbeats = HeartbeatThread(
            self.addresses,
            settings.cluster.name,
            self._version,
            self._interval,
            on_status=self._hear,
            on_refusal=self._refused,
            on_unreachable=self._unreachable,
            max_stale_seconds=STALE_HEARTBEATS * self._interval,
            clock=clock,
        )
        self._refusals = RefusalProbe(self.addresses, self._vanished, clock)
        self.status = self._make_status()
        self._membership.heard(self.status, self._started)
        self.view: ClusterView = self._membership.view(self._started)

    # -- life ------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return self._version

    @property
    def leads(self) -> bool:
        return self._leadership.node_id == self.identity.node_id

    def picture(self) -> tuple[ClusterView, Leadership, ClusterDocument]:
        """What this node believes now."""
        return self.view, self._leadership, self.state.document

    def office(self) -> dict[str, Any]:
        """Who leads and why, as this node sees it, and what has happened lately."""
        return {"election": self.authority.report(self.view), **self.history.to_json()}

    async def run(self) -> None:
        """Beat, converge and look after the machine, until cancelled."""
        self._heartbeats.start()
        self.authority.start()
        self._round_trips.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat(), name="heartbeat")
            group.create_task(self._converge_always(), name="converge")
            group.create_task(self._check_machine(), name="machine")

    async def drain(self) -> None:
        """Ask for nothing new and for what is here to move; returns when this node may leave without a stream's loss.

        A pipeline that has no other place stays until its sequences are done.
        """
        self._draining = True
        self._wake.set()
        self._publish(at_once=True)
        if self._holds():
            # A round of heartbeats: the coordinator hears of it, and we hear what runs.
            await asyncio.sleep(self._interval)
        while self._holds(busy=True):
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _holds(self, *, busy: bool = False) -> bool:
        """Whether the document gives this node a stage; with ``busy``, one of a pipeline that has sequences."""
        own = self.identity.node_id
        here = {p.pipeline for p in self.state.document.plans if any(s.node_id == own for s in p.stages)}
        running = {p.plan.pipeline: p.running for s in self.view.living for p in s.pipelines}
        return any(running.get(pipeline, 0) > 0 for pipeline in here) if busy else bool(here)

    async def stop(self, grace_seconds: float) -> None:
        """Leave in good order: the others are told first, then drivers and stage processes end.

        Running requests hear that the node is stopping.
        """
        self._leaving = True
        self._round_trips.stop()
        self._refusals.stop()
        await self.authority.stop()
        self._publish(at_once=True)
        for task in list(self._tasks):
            task.cancel()
        await self.drivers.end_all_but(())
        await self.stages.stop_all(grace_seconds)
        await asyncio.to_thread(self._heartbeats.stop)
        await self.peers.close()

    # -- the heartbeat of decisions ----------------------------------------------------------------------

    async def _beat(self) -> None:
        """Once per interval, and at once when something has happened that a decision may depend on."""
        while True:
            self._wake.clear()
            self._decide()
            self._publish(at_once=self._said_of_office != self._office())
            due = self._clock() + self._interval
            await asyncio.sleep(SHORTEST_BEAT_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval - SHORTEST_BEAT_SECONDS):
                    await self._wake.wait()
            if not self._wake.is_set():
                self._word.late_seconds = self._clock() - due

    def _decide(self) -> None:
        now = self._clock()
        self.view = self._membership.tick(now)
        if self._watch.look(self.view):
            self.drivers.nodes_changed()
        self._look_at_pipelines()
        self._leadership = self.authority.observe(self.view, self.state.document)
        self.metrics.cluster.term.set(self._leadership.term)
        self.metrics.cluster.leads.set(self.leads)
        self.metrics.cluster.has_quorum.set(self._leadership.node_id is not None)
        if not self._confirmed and self._leader_confirms():
            self._confirmed = True
            self._converge_needed.set()
        if self.leads and (why := self.authority.waiting()):
            _log.debug("coordinator waits", reason=why)
            return
        decision = self._coordinator.decide(self.view, self._leadership, self.state.document, now)
        self._unplaced = decision.unplaced
        if decision.waiting:
            _log.debug("coordinator waits", reason=decision.waiting)
        if decision.commit is not None:
            self.authority.commit(decision.commit)
        told = tuple(n for n in decision.push if self.leads and self._must_be_told(n))
        if told:
            self._spawn(push(self.state.document, told, self.peers.put_document), "push document")

    def _look_at_pipelines(self) -> None:
        self.pipeline_watch.look(self.view, self.drivers.statuses(), self._clock())

    def _must_be_told(self, node_id: int) -> bool:
        node = self.view.node(node_id)
        return node is not None and node.status is not None and self.authority.tells(node.status.voter)

    def _leader_confirms(self) -> bool:
        """Whether the living leader works, in its present term, with the very document that this node remembers."""
        leader = self.view.node(self._leadership.node_id) if self._leadership.node_id is not None else None
        if leader is None or leader.status is None or leader.node_id == self.identity.node_id:
            return False
        word = leader.status
        ours = self.state.document
        return word.document == ours.rank and word.document_hash == ours.hash() and word.document[1] == word.term

    def _office(self) -> tuple[Leadership, Voice]:
        return self._leadership, Voice(self.authority.voter, self.authority.founded, self.authority.backs)

    def _office_changed(self) -> None:
        """Somebody else leads, or this voter has become another: look at once."""
        self._wake.set()

    def _take_committed(self, document: ClusterDocument) -> None:
        """The election (or the fixed coordinator, this node) has decided."""
        try:
            self._take(document)
        except ClusterError as error:
            _log.warning("a committed document is not taken", rank=document.rank, reason=str(error))
        else:
            self.history.note("document_committed", rank=list(document.rank), plans=_describe(document))
            self._wake.set()

    def _take(self, document: ClusterDocument) -> None:
        """Accept a document and have everything follow it. Raises as ``document.accept``."""
        self.state.accept(document)
        self._confirmed = True
        self._converge_needed.set()
        self._spawn(self._announce_document(), "announce document")
        self._change()

    async def _announce_document(self) -> None:
        async with self._document_changed:
            self._document_changed.notify_all()

    async def _check_machine(self) -> None:
        """The slow look: free memory, and models that have been copied here meanwhile."""
        while True:
            await asyncio.to_thread(self._word.look)
            if await self.models.refresh():
                self._change()
            await asyncio.sleep(self.settings.coordinator.health_check_interval)

    # -- what this node says and hears ---------------------------------------------------------------------

    def _make_status(self) -> NodeStatus:
        self._said_of_office = self._office()
        return self._word.say(
            *self._said_of_office,
            self.state.document,
            self.models,
            stages=self.stages.statuses(),
            pipelines=self.drivers.statuses(),
            epochs=self.state.epochs,
            unplaced=self._unplaced,
            recoveries=self.history.recoveries,
            round_trips=self.addresses.round_trips(),
            leaving=self._leaving,
            draining=self._draining,
        )

    def _publish(self, *, at_once: bool) -> None:
        self.status = self._make_status()
        self._membership.heard(self.status, self._clock())
        self.view = self._membership.view(self._clock())
        self._heartbeats.publish(self.status, at_once=at_once)

    def _change(self) -> None:
        """Something of this node changed: tell everybody now, once for all changes of this turn of the loop."""
        if not self._change_pending:
            self._change_pending = True
            asyncio.get_running_loop().call_soon(self._publish_change)

    def _publish_change(self) -> None:
        self._change_pending = False
        self._publish(at_once=True)

    def _hear(self, status: NodeStatus) -> None:
        try:
            self.heartbeat(status)
        except ClusterError as error:
            _log.warning("heartbeat refused", node=status.node_id, reason=str(error))

    def _refused(self, node_id: int, error: ClusterError) -> None:
        _log.warning("our heartbeat was refused", by=self.view.name_of(node_id), code=error.code, reason=str(error))

    def _unreachable(self, node_id: int) -> None:
        if not self.view.is_dead(node_id):
            self._refusals.look(node_id)

    def _vanished(self, node_id: int, since: float) -> None:
        self._membership.vanished(node_id, since)
        self._wake.set()

    # -- what other agents ask (``rpc.ClusterHandler``) -----------------------------------------------------

    def heartbeat(self, status: NodeStatus) -> NodeStatus:
        now = self._clock()
        node = self.view.node(status.node_id)
        before = node.status if node is not None else None
        if self._membership.heard(status, now):
            self.peers.heard(status.node_id)
            self.view = self._membership.view(now)
            if before is None or _serves(status) != _serves(before):
                self._look_at_pipelines()
                self._heartbeats.hurry()  # a pipeline that breaks may be the first sign of a node that is gone
            if before is None or _weighs(status) != _weighs(before):
                self._wake.set()
        return self.status

    def vote(self, message: Message) -> None:
        self.authority.hear(message)

    async def put_document(self, document: ClusterDocument) -> None:
        self._take(document)

    async def start_stage(
        self, plan: Plan, index: int, epoch: Epoch, fresh: bool
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        """Start a stage that the document in force gives to this node. Raises ``Fenced`` otherwise."""
        await self._await_document(plan)
        ours = self.state.document.plan(plan.pipeline)
        if ours is None or _without_transport(ours) != _without_transport(plan):
            version = ours.version if ours else None
            raise Fenced(
                f"{self.identity.name} follows plan {version} of {plan.pipeline}; it does not start plan {plan.version}"
            )
        if plan.stages[index].node_id != self.identity.node_id or epoch.version != plan.version:
            raise Fenced(f"stage {index} of {plan.pipeline} in epoch {epoch} is not {self.identity.name}'s")
        starting = self.stages.start(plan, index, epoch, fresh=fresh)
        async with contextlib.aclosing(starting):  # a driver that leaves ends the start
            async for progress in starting:
                yield progress

    async def link_stage(self, request: cluster_pb2.LinkStageRequest) -> None:
        plan = self.state.document.plan(request.pipeline)
        if plan is not None and plan.num_stages == len(request.stage_addresses):
            request.stage_addresses[:] = self._dialled(plan, request.stage_addresses)
        await self.stages.link(request)

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        await self.stages.stop(pipeline, index, epoch, reason)

    async def _await_document(self, plan: Plan) -> None:
        def knows() -> bool:
            ours = self.state.document.plan(plan.pipeline)
            return self._confirmed and ours is not None and ours.version >= plan.version

        try:
            async with asyncio.timeout(DOCUMENT_WAIT_SECONDS), self._document_changed:
                await self._document_changed.wait_for(knows)
        except TimeoutError:
            raise Fenced(
                f"{self.identity.name} has not got plan {plan.version} of {plan.pipeline} from the coordinator"
            ) from None

    # -- convergence on the document -------------------------------------------------------------------------

    async def _converge_always(self) -> None:
        while True:
            await self._converge_needed.wait()
            self._converge_needed.clear()
            await self._converge(self.state.document)

    async def _converge(self, document: ClusterDocument) -> None:
        """First end what the document no longer names, then drive what it gives to this node."""
        mine = [plan for plan in document.plans if plan.engine_node_id == self.identity.node_id]
        await self.drivers.end_all_but(mine)
        self._look_at_pipelines()
        await self.stages.keep_only(document.plans)
        self.drivers.start(mine)
        self._change()

    def _dialled(self, plan: Plan, stage_addresses: Sequence[str]) -> list[str]:
        """The stages' addresses as this node reaches them best now; the one who sends chooses the way."""
        return [
            self.addresses.of_port(stage.node_id, address)
            for stage, address in zip(plan.stages, stage_addresses, strict=True)
        ]

    def _make_driver(self, plan: Plan) -> PipelineDriver:
        return PipelineDriver(
            plan,
            agents=self._agent,
            next_epoch=self._next_epoch,
            make_engine=lambda plan, epoch, addresses, costs: self._make_engine(
                plan, epoch, self._dialled(plan, addresses), costs
            ),
            choose_transport=lambda plan, failed: with_transport(self.settings, plan, self.view.living, failed),
            dead_node=self._dead_node,
            on_change=self._pipeline_changed,
            timing=self._timing,
        )

    def _pipeline_changed(self) -> None:
        """A driver has told: look now, for at the next beat the pipeline may be ready again."""
        self._look_at_pipelines()
        self._change()

    def _next_epoch(self, plan: Plan) -> Epoch:
        """Persisted before it is used, and above whatever a living node has seen of this plan."""
        named = [
            epoch
            for status in self.view.living
            for pipeline, epoch in status.epochs
            if pipeline == plan.pipeline and epoch.version == plan.version
        ]
        return self.state.next_epoch(plan.pipeline, plan.version, max(named, default=None))

    def _dead_node(self, plan: Plan) -> str:
        for stage in plan.stages:
            node = self.view.node(stage.node_id)
            if node is None or node.state == "dead":
                return f"{self.view.name_of(stage.node_id)} is dead ({node.detail if node else 'unknown'})"
        return ""

    def _stage_port(self) -> int:
        return self.stages.stage_port(self.identity.bind_host, self.identity.ports.stage)

    def _room(self, pipeline: str) -> int:
        return available_bytes(self.status, pipeline, self.view.living)

    def _agent(self, node_id: int) -> StageAgent:
        return OwnAgent(self) if node_id == self.identity.node_id else self.peers.client(node_id)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _without_transport(plan: Plan) -> Plan:
    """The driver may choose another kind of link than the document says, and nothing else."""
    return replace(plan, transport="", transport_reason="")


def _weighs(status: NodeStatus) -> tuple[object, ...]:
    """What of a status a decision may depend on at once."""
    changes = status.leaving, status.draining, status.founded, status.backs, status.voter
    return status.boot_id, *changes, status.document, status.missing


def _serves(status: NodeStatus) -> tuple[object, ...]:
    """What of a status says which pipelines serve, and since which epoch."""
    return status.boot_id, *((p.plan.pipeline, p.epoch, p.state) for p in status.pipelines)


def _describe(document: ClusterDocument) -> dict[str, list[str]]:
    return {p.pipeline: [f"{s.node_id}:[{s.start},{s.end})" for s in p.stages] for p in document.plans}
