"""Bringing a plan up and keeping it up: the work of the agent that holds stage 0.

Owns: the order load everywhere → link everywhere → engine → canary → ready, the incarnations of a plan, the fall-back
from an mlx link to gRPC, and the pauses between attempts.
Does not own: which plan is in force (the cluster document), the stage processes (``stages``), the streams (``engine``).
Invariant: an engine is offered only after a token went through all its stages; every attempt has an epoch of its own;
processes that came up together and then did not work together are not kept for the next attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from mlx_cluster import log
from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.status import PipelineState, PipelineStatus
from mlx_cluster.engine.prefix import RowCost
from mlx_cluster.errors import ClusterError, LinkUnavailable, StageLost, Unavailable
from mlx_cluster.node.traffic import Traffic
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.request import Engine
from mlx_cluster.transport.choose import MLX_KINDS

_log = log.get(__name__)
T = TypeVar("T")

LINK_MARGIN_SECONDS = 10.0  # beyond the stage's own deadline, so that its reason arrives instead of ours


class StageAgent(Protocol):
    """A node's agent as the driver sees it; ``cluster.rpc.ClusterClient`` is one."""

    def start_stage(
        self, plan: Plan, index: int, epoch: Epoch, fresh: bool, timeout_seconds: float
    ) -> AsyncGenerator[cluster_pb2.StageProgress]: ...

    async def link_stage(self, request: cluster_pb2.LinkStageRequest, timeout_seconds: float) -> None: ...

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None: ...


class DrivenEngine(Engine, Protocol):
    """The part of ``engine.engine.PipelineEngine`` that is used here."""

    @property
    def lost(self) -> asyncio.Event: ...

    @property
    def lost_reason(self) -> str: ...

    @property
    def hung(self) -> int | None:
        """The stage that ended the epoch by its silence, if one did."""
        ...

    @property
    def running(self) -> int: ...

    @property
    def step_seconds(self) -> tuple[float, ...]: ...

    async def start(self, timeout_seconds: float) -> None: ...

    async def canary(self, timeout_seconds: float) -> None: ...

    async def stop(self, error: ClusterError | None = None) -> None: ...

    def statistics(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of one attempt, and the pauses between attempts (doubling from ``first`` to ``longest``)."""

    load_seconds: float = 600.0
    link_seconds: float = 25.0
    canary_seconds: float = 120.0
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 15.0
    settled_seconds: float = (
        5.0  # a pipeline that was ready this long starts its pauses anew: it works, and was hit again
    )


EngineMaker = Callable[[Plan, Epoch, Sequence[str], Sequence[RowCost]], DrivenEngine]
# (plan, kind → why its bring-up failed) → the plan with the transport to try; raises ``LinkUnavailable``
TransportChoice = Callable[[Plan, Mapping[str, str]], Plan]


class PipelineDriver:
    """Drives one plan from birth to replacement: ``run`` ends only when it is cancelled.

    ``dead_node`` names why a node of the plan cannot be used now, or is empty.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        agents: Callable[[int], StageAgent],
        next_epoch: Callable[[Plan], Epoch],
        make_engine: EngineMaker,
        choose_transport: TransportChoice,
        dead_node: Callable[[Plan], str],
        on_change: Callable[[], None],
        timing: Timing,
    ) -> None:
        self.plan = plan
        self._agents, self._next_epoch, self._make_engine = agents, next_epoch, make_engine
        self._choose_transport, self._dead_node = choose_transport, dead_node
        self._on_change, self._timing = on_change, timing
        self._engine: DrivenEngine | None = None
        self._status = PipelineStatus(plan, Epoch(plan.version, 0), "loading", "not started yet")
        self._failed_kinds: dict[str, str] = {}
        self._lost = ""  # why the last epoch that was ready is so no more
        self._hung: int | None = None  # the stage whose process must not be kept
        self._traffic = Traffic()
        self._nodes_changed = asyncio.Event()

    @property
    def status(self) -> PipelineStatus:
        engine = self._engine
        if engine is None:
            return self._status
        sent = self._traffic.rates(time.monotonic(), engine.statistics().get("sent_bytes", ()))
        return replace(
            self._status, running=engine.running, step_seconds=engine.step_seconds, sent_bytes_per_second=sent
        )

    @property
    def engine(self) -> DrivenEngine | None:
        """The engine while the pipeline is ready, else None."""
        return self._engine if self._status.state == "ready" else None

    def nodes_changed(self) -> None:
        """Some node of the cluster died or came back: look again."""
        self._nodes_changed.set()

    def crashed(self) -> None:
        """``run`` ended by a bug: say so for as long as this plan is in force."""
        self._tell("failed", "internal error: see the log of this node")

    async def run(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            ready_at: float | None = None
            try:
                engine = await self._while_all_live(self._bring_up())
                ready_at = loop.time()
                await self._while_all_live(_until_lost(engine))
            except LinkUnavailable as error:
                if self._falls_back(error):
                    continue
                self._tell("failed", str(error))
            except ClusterError as error:
                if ready_at is not None:
                    self._lost = str(error)
                self._tell("failed" if ready_at is None else "loading", str(error))
            finally:
                await self._end_engine()
            if ready_at is not None and loop.time() - ready_at > self._timing.settled_seconds:
                failures = 0
            await self._pause(failures)
            failures += 1

    # -- one attempt ---------------------------------------------------------------------------------------

    async def _bring_up(self) -> DrivenEngine:
        plan = self._choose_transport(self.plan, self._failed_kinds)
        epoch = self._next_epoch(self.plan)
        self._status = PipelineStatus(plan, epoch, "loading", "starting the stages", lost=self._lost)
        self._on_change()
        came_up = False
        try:
            loaded = await _all(self._load(plan, stage.index, epoch) for stage in plan.stages)
            came_up, self._hung = True, None
            addresses = [progress.address for progress in loaded]
            self._tell("loading", f"linking the stages ({plan.transport})")
            mlx_addresses = [progress.mlx_address for progress in loaded]
            await _all(self._link(plan, stage.index, epoch, addresses, mlx_addresses) for stage in plan.stages)
            self._tell("loading", "sending the first token")
            engine = self._engine = self._make_engine(
                plan, epoch, addresses, [_row_cost(progress) for progress in loaded]
            )
            await engine.start(self._timing.link_seconds)
            await engine.canary(self._timing.canary_seconds)
        except ClusterError:
            # Where only some could not load the others wait for the next attempt, which goes on with what they hold.
            if came_up or plan.transport in MLX_KINDS:
                await self._stop_stages(plan, epoch)
            raise
        self._tell("ready", "")
        _log.info("pipeline ready", pipeline=plan.pipeline, epoch=str(epoch), transport=plan.transport)
        return engine

    async def _load(self, plan: Plan, index: int, epoch: Epoch) -> cluster_pb2.StageProgress:
        agent = self._agents(plan.stages[index].node_id)
        starting = agent.start_stage(plan, index, epoch, index == self._hung, self._timing.load_seconds)
        async with contextlib.aclosing(starting):
            async for progress in starting:
                if progress.state == "loaded":
                    return progress
        raise Unavailable(f"the agent of stage {index} of {plan.pipeline} ended the start without a result")

    async def _link(
        self, plan: Plan, index: int, epoch: Epoch, addresses: Sequence[str], mlx_addresses: Sequence[str]
    ) -> None:
        request = cluster_pb2.LinkStageRequest(
            pipeline=plan.pipeline,
            stage=index,
            epoch=str(epoch),
            transport=plan.transport,
            stage_addresses=addresses,
            mlx_addresses=mlx_addresses,
        )
        agent = self._agents(plan.stages[index].node_id)
        await agent.link_stage(request, self._timing.link_seconds + LINK_MARGIN_SECONDS)

    async def _stop_stages(self, plan: Plan, epoch: Epoch) -> None:
        """After a failed attempt: free the memory of those that did come up, as far as their agents answer."""

        async def stop(index: int) -> None:
            with contextlib.suppress(ClusterError):
                agent = self._agents(plan.stages[index].node_id)
                await agent.stop_stage(plan.pipeline, index, epoch, "the pipeline did not come up")

        await asyncio.gather(*(stop(stage.index) for stage in plan.stages))

    # -- between attempts ----------------------------------------------------------------------------------

    def _falls_back(self, error: LinkUnavailable) -> bool:
        """Whether another kind of link is left to try; the next attempt follows at once."""
        kind = self._status.plan.transport
        failed = {**self._failed_kinds, kind: str(error)}
        try:
            choice = self._choose_transport(self.plan, failed)
        except LinkUnavailable:
            return False
        if choice.transport == kind:
            return False
        _log.warning("transport falls back", pipeline=self.plan.pipeline, failed=kind, reason=str(error))
        self._failed_kinds = failed
        return True

    async def _pause(self, failures: int) -> None:
        """The first restart follows at once; then pauses double. A change among the nodes ends the pause."""
        dead = self._dead_node(self.plan)
        if failures == 0 and not dead:
            return
        if dead:
            self._tell("failed", dead)
        seconds = min(self._timing.first_pause_seconds * 2.0 ** min(failures, 16), self._timing.longest_pause_seconds)
        self._nodes_changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._nodes_changed.wait()

    async def _while_all_live(self, work: Awaitable[T]) -> T:
        """The result of ``work``, or ``StageLost`` as soon as a node of the plan is dead."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                if dead := self._dead_node(self.plan):
                    raise StageLost(dead)
                self._nodes_changed.clear()
                change = asyncio.ensure_future(self._nodes_changed.wait())
                try:
                    await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
                if task.done():
                    return task.result()
        finally:
            await _cancelled(task)

    async def _end_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            self._hung = engine.hung
            await engine.stop(StageLost(self._status.detail or f"pipeline {self.plan.pipeline} is being replaced"))

    def _tell(self, state: PipelineState, detail: str) -> None:
        self._status = replace(self._status, state=state, detail=detail)
        if state == "failed":
            _log.error("pipeline failed", pipeline=self.plan.pipeline, epoch=str(self._status.epoch), reason=detail)
        self._on_change()


def _row_cost(progress: cluster_pb2.StageProgress) -> RowCost:
    budget = progress.kv_budget_bytes if progress.HasField("kv_budget_bytes") else None
    return RowCost(progress.kv_bytes_per_position, progress.kv_fixed_bytes, progress.can_trim, budget)


async def _until_lost(engine: DrivenEngine) -> None:
    await engine.lost.wait()
    raise StageLost(engine.lost_reason)


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; the first failure cancels the rest and is raised alone."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _cancelled(task: asyncio.Future[T]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
