"""The stage processes of this node.

Owns: at most one process per (pipeline, stage index), its leased mlx port, and what the node says of it; which process
of an older epoch goes over to a newer one with its weights.
Does not own: whether the cluster document asks for the stage (``agent``), the process itself (``stage.process``).
Invariant: a stage of an older epoch never starts; before a newer one starts, whatever this node holds of a pipeline's
older epochs has been killed, or has answered in time that it let go of everything but its weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from mlx_cluster import log
from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.status import StageState, StageStatus
from mlx_cluster.config.ports import is_free
from mlx_cluster.config.quantity import format_bytes
from mlx_cluster.errors import ClusterError, Fenced, StageStartError
from mlx_cluster.node.leases import Lease, PortLeases
from mlx_cluster.node.state import NodeState
from mlx_cluster.plan import Epoch, Plan, StageAssignment
from mlx_cluster.stage.spec import LinkCommand, StageEvent, StageSpec

STOP_GRACE_SECONDS = 3.0
HUNG_GRACE_SECONDS = 0.2  # a process that does not answer does not hear SIGTERM either
_WITHOUT_MLX = ("inprocess", "grpc")  # transports that need no port of the leased range

_log = log.get(__name__)


class StageHandle(Protocol):
    """The part of ``stage.process.StageProcess`` that is used here."""

    @property
    def pid(self) -> int: ...

    async def loaded(self) -> StageEvent: ...

    async def link(self, command: LinkCommand) -> None: ...

    def can_become(self, spec: StageSpec) -> bool: ...

    async def adopt(
        self, spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> None: ...

    async def stop(self, grace_seconds: float = ...) -> None: ...


class StageStarter(Protocol):
    def __call__(
        self, spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> Awaitable[StageHandle]: ...


# (plan, index, epoch) → everything the process must know; raises when this node cannot load the plan's model
SpecMaker = Callable[[Plan, int, Epoch], StageSpec]


# (bytes granted for weights and rows, bytes that the weights took) → bytes for rows
KvBudget = Callable[[int | None, int], int]


@dataclass(slots=True)
class _Held:
    """A stage of this node, running or ended; an ended one stays in the table to say why."""

    plan: Plan
    index: int
    epoch: Epoch
    compression: str = "off"  # of what it sends
    lease: Lease | None = None
    process: StageHandle | None = None
    kept: bool = False  # from an older epoch
    state: StageState = "starting"
    granted_bytes: int | None = None  # for weights and rows
    memory_bytes: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    detail: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def node_id(self) -> int:
        return self.plan.stages[self.index].node_id

    def num_layers_of(self, stage: StageAssignment) -> int:
        """How many layers of another stage are here."""
        own = self.plan.stages[self.index]
        return max(0, min(own.end, stage.end) - max(own.start, stage.start))

    def status(self) -> StageStatus:
        stage = self.plan.stages[self.index]
        return StageStatus(
            pipeline=self.plan.pipeline,
            epoch=self.epoch,
            index=self.index,
            start=stage.start,
            end=stage.end,
            pid=self.process.pid if self.process is not None else 0,
            state=self.state,
            memory_bytes=self.memory_bytes if self.process is not None else 0,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            detail=self.detail,
            compression=self.compression,
        )


class StageHost:
    """``advertised_host`` is where other nodes reach this one; ``mlx_host`` its IPv4 address, for the ring."""

    def __init__(
        self,
        state: NodeState,
        make_spec: SpecMaker,
        start_process: StageStarter,
        leases: PortLeases,
        *,
        advertised_host: str,
        mlx_host: str,
        link_timeout_seconds: float,
        on_change: Callable[[], None],
        kv_budget: KvBudget | None = None,
    ) -> None:
        self._kv_budget = kv_budget
        self._state, self._make_spec, self._start_process, self._leases = state, make_spec, start_process, leases
        self._advertised_host, self._mlx_host = advertised_host, mlx_host
        self._link_timeout_seconds = link_timeout_seconds
        self._on_change = on_change
        self._held: dict[tuple[str, int], _Held] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def statuses(self) -> tuple[StageStatus, ...]:
        return tuple(held.status() for _, held in sorted(self._held.items()))

    @property
    def num_running(self) -> int:
        return sum(1 for held in self._held.values() if held.process is not None)

    def stage_port(self, host: str, wanted: int) -> int:
        """The node's stage port for its first stage, 0 (any) for further ones or while somebody else holds it."""
        return wanted if self.num_running == 0 and is_free(host, wanted) else 0

    # -- start -----------------------------------------------------------------------------------------

    async def start(
        self, plan: Plan, index: int, epoch: Epoch, *, fresh: bool = False
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        """Start a stage and follow it until it is loaded; the last progress carries its addresses.

        A process that holds layers of the pipeline from an older epoch goes on with them, unless ``fresh`` says that
        the one of this stage is known to hang.
        Closing the iterator before that stops the stage. Raises ``Fenced``, ``CheckpointError``, ``StageStartError``.
        """
        held = await self._spawn(plan, index, epoch, fresh)
        left = False
        assert held.process is not None
        finished = asyncio.create_task(held.process.loaded(), name=f"load {plan.pipeline} {index}")
        finished.add_done_callback(lambda _: held.changed.set())
        complete = False
        try:
            while not finished.done():
                held.changed.clear()
                yield cluster_pb2.StageProgress(
                    state="loading", done_bytes=held.done_bytes, total_bytes=held.total_bytes
                )
                await held.changed.wait()
            event = finished.result()
            self._check_current(held)
            held.state, held.memory_bytes = "loaded", event.memory_bytes
            budget = await self._budget(held, event)
            complete = True
            self._on_change()
            yield cluster_pb2.StageProgress(
                state="loaded",
                done_bytes=held.done_bytes,
                total_bytes=held.total_bytes,
                address=f"{self._advertised_host}:{event.address.rpartition(':')[2]}",
                mlx_address=f"{self._mlx_host}:{held.lease.port}" if held.lease else "",
                can_trim=event.can_trim,
                kv_bytes_per_position=event.kv_bytes_per_position,
                kv_fixed_bytes=event.kv_fixed_bytes,
                kv_budget_bytes=budget,
            )
        except ClusterError as error:
            self._fail(held, str(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            left = True
            raise
        finally:
            finished.cancel()
            if left and held.kept and not complete:
                held.state = "loaded"  # another stage did not load: the next attempt goes on with this one
            elif not complete:
                await self._end(held)

    async def _budget(self, held: _Held, event: StageEvent) -> int | None:
        """Bytes for the rows of a stage that has just loaded; None where they cost nothing, as when it is emulated."""
        if self._kv_budget is None or not (event.kv_bytes_per_position or event.kv_fixed_bytes):
            return None
        budget = await asyncio.to_thread(self._kv_budget, held.granted_bytes, event.memory_bytes)
        positions = max(0, budget - event.kv_fixed_bytes) // max(1, event.kv_bytes_per_position)
        _log.info("memory for rows", stage=held.index, kv_budget=format_bytes(budget), positions=positions)
        return budget

    async def _spawn(self, plan: Plan, index: int, epoch: Epoch, fresh: bool) -> _Held:
        async with self._lock(plan.pipeline):
            self._state.see(plan.pipeline, epoch)
            current = self._held.get((plan.pipeline, index))
            if current is not None and current.epoch >= epoch:
                raise Fenced(f"stage {index} of {plan.pipeline} was already started in epoch {current.epoch}")
            kept = None if fresh else self._keepable(plan, index)
            grace_seconds = HUNG_GRACE_SECONDS if fresh else STOP_GRACE_SECONDS
            await self._end_pipeline(plan.pipeline, epoch, but=kept, grace_seconds=grace_seconds)
            held = await self._go_over(kept, plan, index, epoch) if kept is not None else None
            if held is None:
                held = await self._start_afresh(plan, index, epoch)
            held.state = "loading"
            self._on_change()
            return held

    async def _start_afresh(self, plan: Plan, index: int, epoch: Epoch) -> _Held:
        spec = replace(self._make_spec(plan, index, epoch), keep=plan.transport in _WITHOUT_MLX)
        held = self._enter(spec)
        try:
            if not spec.keep:
                held.lease = self._leases.lease(self._mlx_host)
            held.process = await self._start_process(
                spec,
                on_progress=lambda event: self._on_progress(held, event),
                on_exit=lambda reason: self._on_exit(held, reason),
            )
        except ClusterError as error:
            self._fail(held, str(error))
            raise
        return held

    def _enter(self, spec: StageSpec) -> _Held:
        """A new line in the table."""
        held = _Held(
            spec.plan, spec.index, spec.epoch, granted_bytes=spec.memory_budget_bytes, compression=spec.compression
        )
        self._held[(spec.plan.pipeline, spec.index)] = held
        return held

    # -- keeping layers --------------------------------------------------------------------------------

    def _keepable(self, plan: Plan, index: int) -> _Held | None:
        """What this node has of the pipeline's layers in a process that may go on under ``plan``."""
        if plan.transport not in _WITHOUT_MLX:
            return None  # an mlx group cannot be made twice in a process
        stage = plan.stages[index]
        found = [
            held
            for held in self._held.values()
            if held.plan.pipeline == plan.pipeline
            and held.plan.model == plan.model
            and held.process is not None
            and held.lease is None
        ]
        return max(found, key=lambda held: held.num_layers_of(stage), default=None)

    async def _go_over(self, kept: _Held, plan: Plan, index: int, epoch: Epoch) -> _Held | None:
        """Have a process of an older epoch go over to this one; None where it cannot, and then it is gone."""
        spec = replace(self._make_spec(plan, index, epoch), keep=True)
        process = kept.process
        del self._held[(kept.plan.pipeline, kept.index)]
        if process is None or not process.can_become(spec):
            await self._end(kept)
            return None
        held = self._enter(spec)
        held.kept, held.memory_bytes = True, kept.memory_bytes
        kept.process, held.process = None, process  # whoever still follows the older epoch must not end it
        adopting = asyncio.ensure_future(
            process.adopt(
                spec,
                on_progress=lambda event: self._on_progress(held, event),
                on_exit=lambda reason: self._on_exit(held, reason),
            )
        )
        try:
            await asyncio.shield(adopting)
        except asyncio.CancelledError:
            # The caller has left: another stage cannot be started. This process is for the next attempt.
            held.state = "loaded"
            await asyncio.wait([adopting])
            if adopting.exception() is not None:
                held.process = None
            raise
        except ClusterError as error:
            held.process = None
            _log.warning("a stage process is not kept", pipeline=plan.pipeline, stage=index, reason=str(error))
            return None
        _log.info("a stage process is kept", pipeline=plan.pipeline, stage=index, epoch=str(epoch), pid=process.pid)
        return held

    def _on_progress(self, held: _Held, event: StageEvent) -> None:
        if event.type == "loading":
            held.done_bytes, held.total_bytes = event.done_bytes, event.total_bytes
            held.changed.set()
        elif event.type == "ended":
            held.state, held.detail = "loaded", event.message
            self._on_change()

    def _on_exit(self, held: _Held, reason: str) -> None:
        _log.warning("stage process ended", pipeline=held.plan.pipeline, stage=held.index, reason=reason)
        held.process = None
        self._release(held)
        self._fail(held, reason)

    def _fail(self, held: _Held, detail: str) -> None:
        held.state, held.detail = "failed", detail
        held.changed.set()
        self._on_change()

    # -- link ------------------------------------------------------------------------------------------

    async def link(self, request: cluster_pb2.LinkStageRequest) -> None:
        """Have a loaded stage bring up its links. Raises ``LinkError``, ``Fenced``, ``StageStartError``."""
        held = self._held.get((request.pipeline, request.stage))
        epoch = Epoch.parse(request.epoch)
        if held is not None and epoch < held.epoch:
            raise Fenced(f"epoch {epoch} of {request.pipeline} is older than {held.epoch}, which runs here")
        if held is None or held.epoch != epoch or held.process is None:
            detail = f": {held.detail}" if held is not None and held.detail else ""
            raise StageStartError(f"stage {request.stage} of {request.pipeline} in epoch {epoch} is not here{detail}")
        held.state = "linking"
        command = LinkCommand(
            transport=request.transport,
            stage_addresses=tuple(request.stage_addresses),
            mlx_addresses=tuple(request.mlx_addresses),
            timeout_seconds=self._link_timeout_seconds,
        )
        try:
            await held.process.link(command)
            self._check_current(held)
        except ClusterError as error:
            self._fail(held, str(error))
            await self._end(held)
            raise
        held.state = "linked"
        self._on_change()

    def _check_current(self, held: _Held) -> None:
        current = self._held.get((held.plan.pipeline, held.index))
        if current is not held:
            raise Fenced(f"stage {held.index} of {held.plan.pipeline} was replaced while epoch {held.epoch} came up")

    # -- stop ------------------------------------------------------------------------------------------

    async def stop(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        """Stop a stage of this epoch or an older one; nothing happens when there is none."""
        async with self._lock(pipeline):
            held = self._held.get((pipeline, index))
            if held is None or held.epoch > epoch:
                return
            _log.info("stage stopped", pipeline=pipeline, stage=index, epoch=str(held.epoch), reason=reason)
            del self._held[(pipeline, index)]
            await self._end(held)
        self._on_change()

    async def keep_only(self, plans: Iterable[Plan]) -> None:
        """Stop what belongs to no plan in force: another pipeline, or an older version of one.

        What a newer plan can go on with stays, and serves nothing until that plan's driver asks for it.
        """
        in_force = {plan.pipeline: plan for plan in plans}
        for pipeline in {held.plan.pipeline for held in self._held.values()}:
            plan = in_force.get(pipeline)
            async with self._lock(pipeline):
                if plan is None:
                    await self._end_pipeline(pipeline, older_than=None)
                    continue
                nodes = {held.node_id for held in self._held.values() if held.plan.pipeline == pipeline}
                own = next((stage.index for stage in plan.stages if stage.node_id in nodes), None)
                kept = None if own is None else self._keepable(plan, own)
                await self._end_pipeline(pipeline, Epoch(plan.version, 0), but=kept)
        self._on_change()

    async def stop_all(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        held = list(self._held.values())
        self._held.clear()
        await asyncio.gather(*(self._end(each, grace_seconds) for each in held))

    async def _end_pipeline(
        self,
        pipeline: str,
        older_than: Epoch | None,
        *,
        but: _Held | None = None,
        grace_seconds: float = STOP_GRACE_SECONDS,
    ) -> None:
        """End this node's stages of a pipeline, all ``but`` one; ``older_than`` None: of every epoch."""
        gone = [
            key
            for key, held in self._held.items()
            if key[0] == pipeline and held is not but and (older_than is None or held.epoch < older_than)
        ]
        await asyncio.gather(*(self._end(self._held.pop(key), grace_seconds) for key in gone))

    async def _end(self, held: _Held, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Kill and reap; the lease comes back only when the process is gone."""
        process, held.process = held.process, None
        if process is not None:
            await process.stop(grace_seconds)
        if held.state != "failed":
            held.state, held.detail = "failed", "stopped"
        self._release(held)
        held.changed.set()

    def _release(self, held: _Held) -> None:
        if held.lease is not None:
            held.lease.release()
            held.lease = None

    def _lock(self, pipeline: str) -> asyncio.Lock:
        return self._locks.setdefault(pipeline, asyncio.Lock())
