from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.status import PipelineStatus
from mlx_cluster.errors import CheckpointError, ClusterError, LinkUnavailable, StageLost, StageStartError
from mlx_cluster.node.bringup import PipelineDriver, Timing
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.request import Event, SequenceRequest
from tests.unit.cluster.builders import plan

FAST = Timing(first_pause_seconds=0.001, longest_pause_seconds=0.002)


class FakeEngine:
    def __init__(self, world: World, epoch: Epoch) -> None:
        self.world, self.epoch = world, epoch
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.hung: int | None = None
        self.stopped_with: ClusterError | None = None
        self.running, self.step_seconds = 0, ()

    async def start(self, timeout_seconds: float) -> None:
        self.world.steps.append("engine")

    async def canary(self, timeout_seconds: float) -> None:
        self.world.steps.append("canary")
        if self.world.canary_errors:
            raise self.world.canary_errors.pop(0)

    async def stop(self, error: ClusterError | None = None) -> None:
        self.stopped_with = error

    def statistics(self) -> dict[str, Any]:
        return {}

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        raise NotImplementedError


class World:
    """Two nodes whose agents do what the test says, and everything the driver did, in order."""

    def __init__(self, value: Plan, timing: Timing = FAST) -> None:
        self.steps: list[str] = []
        self.engines: list[FakeEngine] = []
        self.load_errors: dict[int, list[ClusterError]] = {}
        self.link_errors: dict[str, ClusterError] = {}
        self.canary_errors: list[ClusterError] = []
        self.holding: set[int] = set()  # nodes whose stages load for ever
        self.dead = ""
        self.epoch = Epoch(value.version, 0)
        self.told: list[PipelineStatus] = []
        self.changed = asyncio.Condition()
        self.links: list[cluster_pb2.LinkStageRequest] = []
        self.driver = PipelineDriver(
            value,
            agents=lambda node: FakeAgent(self, node),
            next_epoch=self.next_epoch,
            make_engine=self.make_engine,
            choose_transport=choose,
            dead_node=lambda _: self.dead,
            on_change=self.change,
            timing=timing,
        )
        self.task = asyncio.create_task(self.driver.run())

    def next_epoch(self, _: Plan) -> Epoch:
        self.epoch = Epoch(self.epoch.version, self.epoch.incarnation + 1)
        return self.epoch

    def make_engine(self, value: Plan, epoch: Epoch, addresses: Sequence[str], _costs: object) -> FakeEngine:
        assert list(addresses) == [f"node{s.node_id}:1" for s in value.stages]
        self.engines.append(FakeEngine(self, epoch))
        return self.engines[-1]

    def change(self) -> None:
        self.told.append(self.driver.status)
        asyncio.get_running_loop().create_task(self.wake())

    async def wake(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, fits: Callable[[PipelineStatus], bool]) -> PipelineStatus:
        """The first status told so far, or from now on, that fits."""
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(lambda: any(fits(status) for status in self.told))
        return next(status for status in self.told if fits(status))

    async def ready(self, incarnation: int) -> PipelineStatus:
        return await self.until(lambda s: s.state == "ready" and s.epoch.incarnation == incarnation)

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class FakeAgent:
    def __init__(self, world: World, node: int) -> None:
        self.world, self.node = world, node

    async def start_stage(
        self, value: Plan, index: int, epoch: Epoch, fresh: bool, timeout_seconds: float
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        self.world.steps.append(f"load {index}" + (" afresh" if fresh else ""))
        yield cluster_pb2.StageProgress(state="loading")
        if self.node in self.world.holding:
            await asyncio.Event().wait()
        if errors := self.world.load_errors.get(self.node):
            raise errors.pop(0)
        yield cluster_pb2.StageProgress(state="loaded", address=f"node{self.node}:1", mlx_address=f"node{self.node}:2")

    async def link_stage(self, request: cluster_pb2.LinkStageRequest, timeout_seconds: float) -> None:
        self.world.steps.append(f"link {request.stage}")
        self.world.links.append(request)
        if error := self.world.link_errors.get(request.transport):
            raise error

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        self.world.steps.append(f"stop {index}")


def choose(value: Plan, failed: Mapping[str, str]) -> Plan:
    """``auto``: the ring, gRPC once it has failed."""
    if "grpc" in failed:
        raise LinkUnavailable("nothing is left")
    if value.transport == "auto":
        kind = "grpc" if "ring" in failed else "ring"
        return replace(value, transport=kind, transport_reason="; ".join(failed.values()))
    if value.transport in failed:
        raise LinkUnavailable(f"{value.transport} was asked for")
    return value


TWO = plan({0: 2, 1: 4}, version=3, transport="auto")


async def test_the_order_is_load_link_engine_canary_ready() -> None:
    world = World(TWO)
    assert world.driver.engine is None
    status = await world.ready(1)
    assert world.steps == ["load 0", "load 1", "link 0", "link 1", "engine", "canary"]
    assert (status.epoch, status.plan.transport) == (Epoch(3, 1), "ring")
    assert world.driver.engine is world.engines[0]
    assert list(world.links[1].stage_addresses) == ["node0:1", "node1:1"]
    assert list(world.links[1].mlx_addresses) == ["node0:2", "node1:2"]
    await world.end()
    assert isinstance(world.engines[0].stopped_with, StageLost)


async def test_a_ring_that_does_not_come_up_falls_back_with_the_reason() -> None:
    world = World(TWO)
    world.link_errors["ring"] = LinkUnavailable("port taken")
    status = await world.ready(2)
    assert (status.plan.transport, status.plan.transport_reason) == ("grpc", "port taken")
    assert world.steps.count("stop 0") == 1, "the first incarnation is taken down"
    await world.end()


async def test_a_transport_that_was_asked_for_is_not_replaced() -> None:
    world = World(replace(TWO, transport="ring"))
    world.link_errors["ring"] = LinkUnavailable("port taken")
    status = await world.until(lambda s: s.state == "failed")
    assert status.detail == "port taken"
    world.link_errors.clear()
    assert (await world.until(lambda s: s.state == "ready")).plan.transport == "ring"
    await world.end()


async def test_a_lost_stage_brings_the_pipeline_up_again_in_a_new_incarnation() -> None:
    world = World(TWO)
    await world.ready(1)
    world.engines[0].lost_reason = "stage 1 on node 1: gone"
    world.engines[0].lost.set()
    await world.ready(2)
    lost = next(s for s in world.told if s.detail == "stage 1 on node 1: gone")
    assert (lost.state, lost.epoch) == ("loading", Epoch(3, 1))
    assert {(s.epoch, s.lost) for s in world.told} == {(Epoch(3, 1), ""), (Epoch(3, 2), "stage 1 on node 1: gone")}
    assert str(world.engines[0].stopped_with) == "stage 1 on node 1: gone"
    assert world.driver.engine is world.engines[1]
    await world.end()


@pytest.mark.parametrize("error", [CheckpointError("no such file"), StageStartError("out of memory")])
async def test_a_stage_that_does_not_load_is_shown_and_tried_again(error: ClusterError) -> None:
    world = World(TWO)
    world.load_errors[1] = [error, error, error]
    status = await world.until(lambda s: s.state == "failed")
    assert status.detail == str(error)
    assert (await world.until(lambda s: s.state == "ready")).epoch == Epoch(3, 4)
    assert "link 0" not in world.steps[: world.steps.index("stop 0")]
    await world.end()


async def test_stages_that_did_load_wait_for_the_next_attempt_where_links_can_be_made_again() -> None:
    world = World(replace(TWO, transport="grpc"))
    world.load_errors[1] = [StageStartError("out of memory")]
    await world.until(lambda s: s.state == "ready")
    assert not [step for step in world.steps if step.startswith("stop")]
    await world.end()


async def test_stages_that_came_up_and_did_not_work_together_are_not_kept() -> None:
    world = World(replace(TWO, transport="grpc"))
    world.canary_errors = [StageStartError("no token")]
    await world.ready(2)
    assert {"stop 0", "stop 1"} <= set(world.steps)
    await world.end()


async def test_only_the_stage_that_hung_is_started_afresh_and_only_once() -> None:
    world = World(replace(TWO, transport="grpc"))
    await world.ready(1)
    world.engines[0].lost_reason, world.engines[0].hung = "stage 1 is silent", 1
    world.engines[0].lost.set()
    await world.ready(2)
    world.engines[1].lost.set()
    await world.ready(3)
    loads = [step for step in world.steps if step.startswith("load")]
    assert sorted(loads) == ["load 0", "load 0", "load 0", "load 1", "load 1", "load 1 afresh"]
    await world.end()


async def test_a_pipeline_that_had_worked_comes_back_at_once_however_often_it_is_hit() -> None:
    """Pauses are for what does not come up or breaks at once: here they would last longer than the test."""
    world = World(TWO, Timing(first_pause_seconds=1000.0, longest_pause_seconds=1000.0, settled_seconds=0.0))
    for incarnation in (1, 2, 3, 4):
        await world.ready(incarnation)
        world.engines[-1].lost.set()
    await world.ready(5)
    await world.end()


async def test_no_engine_is_offered_before_a_token_went_through() -> None:
    world = World(TWO)
    world.canary_errors = [StageStartError("no token")]
    status = await world.until(lambda s: s.state == "failed")
    assert status.detail == "no token"
    assert world.engines[0].stopped_with is not None
    await world.ready(2)
    await world.end()


async def test_a_dead_node_ends_a_bring_up_that_would_wait_for_ever() -> None:
    world = World(TWO, Timing(first_pause_seconds=1000.0, longest_pause_seconds=1000.0))
    world.holding.add(1)
    await world.until(lambda s: s.epoch.incarnation == 1)
    world.dead = "mini1 is dead (silent for 3.1 s)"
    world.driver.nodes_changed()
    status = await world.until(lambda s: s.state == "failed")
    assert status.detail == world.dead
    world.dead = ""
    world.holding.clear()
    world.driver.nodes_changed()
    await world.ready(2)
    await world.end()


async def test_a_dead_node_ends_a_ready_pipeline() -> None:
    world = World(TWO)
    await world.ready(1)
    world.dead = "mini1 is dead"
    world.driver.nodes_changed()
    await world.until(lambda s: s.state == "failed" and s.detail == "mini1 is dead")
    assert world.driver.engine is None
    assert str(world.engines[0].stopped_with) == "mini1 is dead"
    await world.end()


async def test_one_stage_comes_up_the_same_way() -> None:
    world = World(plan({0: 6}, version=3, transport="inprocess"))
    await world.ready(1)
    assert world.steps == ["load 0", "link 0", "engine", "canary"]
    await world.end()
