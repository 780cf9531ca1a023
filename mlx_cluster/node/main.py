"""A node from start to end: settings in, exit code out.

Owns: the order of start and stop, signals, the real stage processes and engines that the agent is composed with.
Does not own: any of the parts. Invariant: an orderly stop ends within ``STOP_SECONDS``, and leaves no stage process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from mlx_cluster import log
from mlx_cluster.config.load import Loaded
from mlx_cluster.config.quantity import parse_bytes
from mlx_cluster.config.schema import PrefixCacheSection, Settings, SpeculationSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.engine.memory import StageMemory
from mlx_cluster.engine.prefix import Limits, RowCost
from mlx_cluster.engine.speculation import Bounds
from mlx_cluster.engine.waiting import Share
from mlx_cluster.node import machine
from mlx_cluster.node.agent import Agent
from mlx_cluster.node.bringup import DrivenEngine, EngineMaker, Timing
from mlx_cluster.node.composed import ComposedEngine, response_cache
from mlx_cluster.node.copies import Copies
from mlx_cluster.node.discovery import make_discovery
from mlx_cluster.node.draft import drafting
from mlx_cluster.node.identity import Identity, identify
from mlx_cluster.node.models import LocalModels
from mlx_cluster.node.servers import NodeServers
from mlx_cluster.node.speed import measure_speed
from mlx_cluster.node.stages import StageHandle, StageStarter
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import StageEvent, StageSpec

STOP_SECONDS = 3.5
STAGE_GRACE_SECONDS = 1.5
CANARY_SECONDS = 120.0  # the first token may wait for kernels to be compiled

_log = log.get(__name__)


def run_node(loaded: Loaded, node: str) -> int:
    """Run the agent of ``node`` until SIGTERM (it drains first) or SIGINT (at once); 0 after an orderly stop.

    Raises ``ClusterError`` at start.
    """
    # gRPC's own resolver is unreliable with .local names on macOS; read when gRPC first resolves.
    os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
    # A peer that ends is our own news to tell; gRPC's line about each closed connection is not.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    settings = loaded.settings
    identity = identify(settings, node)
    log.configure(settings.log.level, settings.log.format, node=identity.name)
    return asyncio.run(_run(settings, identity))


async def _run(settings: Settings, identity: Identity) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()

    def leave() -> None:
        (stopping if leaving.is_set() else leaving).set()  # who says it twice does not want to wait

    loop.add_signal_handler(signal.SIGTERM, leave)
    loop.add_signal_handler(signal.SIGINT, stopping.set)
    discovery = make_discovery(settings, identity, machine.versions())
    models = LocalModels(settings, identity.entry, identity.state_dir / "models")
    _, speed = await asyncio.gather(models.refresh(), measure_speed(settings))
    agent = Agent(
        settings,
        identity,
        models,
        start_process=stage_starter(settings),
        make_engine=engine_maker(settings, models, identity.state_dir),
        timing=Timing(
            load_seconds=settings.runtime.load_timeout,
            link_seconds=settings.network.connect_timeout,
            canary_seconds=CANARY_SECONDS,
        ),
        speed_bytes_per_second=speed,
        hints=discovery.hints.of if discovery is not None else lambda _: (),
    )
    servers = NodeServers(agent)
    copies = Copies(settings, identity.node_id, models, lambda: agent.view.living, agent.peers.channel)
    try:
        await servers.start()
        if discovery is not None:
            discovery.start()
        _log.info("node runs", pid=os.getpid(), gateway=identity.gateway_url, admin=identity.admin_url)

        async def drain() -> None:
            await leaving.wait()
            await _drain(agent, servers, settings.runtime.drain_timeout)

        await _until(stopping, agent.run, servers.run, copies.run, drain)
    finally:
        leave_network = asyncio.to_thread(discovery.stop) if discovery is not None else asyncio.sleep(0)
        await asyncio.gather(_stop(agent, servers), leave_network)
    return 0


async def _until(stopping: asyncio.Event, *parts: Callable[[], Awaitable[None]]) -> None:
    """Run the parts until ``stopping`` is set; a part that fails ends the node with its error."""
    tasks = [asyncio.ensure_future(part()) for part in parts]
    stop = asyncio.create_task(stopping.wait(), name="stop signal")
    try:
        done, _ = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()
    finally:
        for task in (stop, *tasks):
            task.cancel()
        await asyncio.gather(stop, *tasks, return_exceptions=True)


async def _drain(agent: Agent, servers: NodeServers, seconds: float) -> None:
    """SIGTERM: no new work, stages move to the others, streams of this gateway end; then the node leaves."""
    _log.info("node drains", seconds=seconds)
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(agent.drain(), servers.drain(seconds))
    except TimeoutError:
        _log.warning("the drain took too long: what still runs here is resumed elsewhere or cut", seconds=seconds)


async def _stop(agent: Agent, servers: NodeServers) -> None:
    """Drivers first, so that running requests hear why; whatever hangs is left to the lifelines of the children."""
    _log.info("node stops")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await asyncio.gather(agent.stop(STAGE_GRACE_SECONDS), servers.stop())
            return
    _log.warning("the stop took too long: what is left is killed")


def stage_starter(settings: Settings) -> StageStarter:
    """Real stage processes."""

    async def start(
        spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> StageHandle:
        return await StageProcess.start(spec, settings.runtime, on_progress=on_progress, on_exit=on_exit)

    return start


def engine_maker(settings: Settings, models: LocalModels, state_dir: Path) -> EngineMaker:
    """Real engines, with what the settings put in front of them; kept answers outlive an engine."""
    cache = response_cache(settings.runtime.response_cache, state_dir)

    def make(plan: Plan, epoch: Epoch, stage_addresses: Sequence[str], row_costs: Sequence[RowCost]) -> DrivenEngine:
        local = models.get(plan.model.id)
        assert local is not None, "stage 0 of this plan was started from this node's own directory"
        pipeline = PipelineEngine(
            plan,
            epoch,
            stage_addresses,
            settings.models[plan.model.id].batching.over(settings.scheduler),
            max_context=local.facts.max_context,
            report_deadline_seconds=settings.runtime.hang_timeout,
            prefix=prefix_limits(settings.runtime.prefix_cache, row_costs),
            drafts=draft_bounds(settings.speculation, row_costs),
            helper=draft_helper(settings, local.directory, models.folders),
            memory=[StageMemory(c.budget_bytes, c.bytes_per_position, c.fixed_bytes) for c in row_costs],
            shares={key.tenant: Share(key.weight, key.max_waiting) for key in settings.api_gateway.keys},
        )
        share = settings.scheduler.share_identical
        return ComposedEngine(pipeline, plan, share=share, cache=cache, reattach=settings.api_gateway)

    return make


def draft_helper(
    settings: Settings, target: Path, folders: tuple[str, ...]
) -> Callable[[PipelineEngine], Coroutine[Any, Any, None]] | None:
    """What brings an engine its draft model, where the settings name one."""
    wanted = settings.speculation.draft_model
    if wanted is None or settings.speculation.mode == "off":
        return None
    return drafting(wanted, target, folders, settings.runtime)


def draft_bounds(section: SpeculationSection, row_costs: Sequence[RowCost]) -> Bounds | None:
    """Bounds of speculation; None when it is switched off, or where a rejected draft could not be taken back."""
    if section.mode == "off" or not row_costs or not all(cost.can_trim for cost in row_costs):
        return None
    return Bounds(section.mode, section.max_draft, section.min_match, section.draft_wait)


def prefix_limits(section: PrefixCacheSection, row_costs: Sequence[RowCost]) -> Limits | None:
    """Bounds of the prefix cache on the stage where an entry takes the most; None when it is switched off."""
    if not section.enabled or not row_costs:
        return None
    return Limits(
        max_bytes=parse_bytes(section.max_bytes),
        bytes_per_position=max(cost.bytes_per_position for cost in row_costs),
        fixed_bytes=max(cost.fixed_bytes for cost in row_costs),
        ttl_seconds=section.ttl_seconds,
        min_tokens=section.min_tokens,
        can_trim=all(cost.can_trim for cost in row_costs),
        disk_max_bytes=parse_bytes(section.disk.max_bytes) if section.disk is not None else 0,
    )
