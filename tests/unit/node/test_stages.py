from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_cluster._pb import cluster_pb2
from mlx_cluster.engine.prefix import RowCost
from mlx_cluster.errors import CheckpointError, ClusterError, Fenced, LinkUnavailable, StageStartError
from mlx_cluster.node.bringup import _row_cost
from mlx_cluster.node.leases import PortLeases
from mlx_cluster.node.stages import StageHost
from mlx_cluster.node.state import NodeState
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.stage.spec import LinkCommand, StageEvent, StageSpec
from tests.unit.cluster.builders import plan
from tests.unit.node.test_leases import three_free_ports


class FakeProcess:
    """A stage process that does what the test says."""

    def __init__(
        self, spec: StageSpec, pid: int, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> None:
        self.spec, self.pid = spec, pid
        self.on_progress, self.on_exit = on_progress, on_exit
        self.load: asyncio.Future[StageEvent] = asyncio.get_running_loop().create_future()
        self.commands: list[LinkCommand] = []
        self.link_error: ClusterError | None = None
        self.stopped = False
        self.adopt_error: ClusterError | None = None
        self.usable = True
        self.adopting: asyncio.Future[None] | None = None

    async def loaded(self) -> StageEvent:
        return await asyncio.shield(self.load)

    async def link(self, command: LinkCommand) -> None:
        self.commands.append(command)
        if self.link_error is not None:
            raise self.link_error

    def can_become(self, spec: StageSpec) -> bool:
        return self.usable and self.spec.can_become(spec)

    async def adopt(
        self, spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> None:
        if self.adopting is not None:
            await self.adopting
        if self.adopt_error is not None:
            self.stopped = True
            raise self.adopt_error
        self.spec, self.on_progress, self.on_exit = spec, on_progress, on_exit
        self.load = asyncio.get_running_loop().create_future()
        self.load.set_result(StageEvent("loaded", address="127.0.0.1:4711", memory_bytes=55))

    async def stop(self, grace_seconds: float = 0.0) -> None:
        self.stopped = True
        self.grace_seconds = grace_seconds
        if not self.load.done():
            self.load.set_exception(StageStartError("was stopped"))


class World:
    """A stage host whose processes are fakes, in the order in which they were started."""

    def __init__(self, folder: Path) -> None:
        self.processes: list[FakeProcess] = []
        self.spawned = asyncio.Condition()
        self.start_error: ClusterError | None = None
        self.spec_error: ClusterError | None = None
        self.changes = 0
        self.state = NodeState(folder, "c")
        low = three_free_ports()
        self.host = StageHost(
            self.state,
            self.spec,
            self.start,
            PortLeases(low, low + 2, folder),
            advertised_host="mini1.local",
            mlx_host="127.0.0.1",
            link_timeout_seconds=7.0,
            on_change=self.changed,
            kv_budget=lambda granted, weights: 1_000_000 - weights - (granted or 0),
        )

    def changed(self) -> None:
        self.changes += 1

    def spec(self, value: Plan, index: int, epoch: Epoch) -> StageSpec:
        if self.spec_error is not None:
            raise self.spec_error
        return StageSpec(value, index, epoch, "dir", "127.0.0.1", 0)

    async def start(
        self, spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> FakeProcess:
        if self.start_error is not None:
            raise self.start_error
        assert all(p.stopped for p in self.processes if p.spec.plan.pipeline == spec.plan.pipeline), "old before new"
        process = FakeProcess(spec, 100 + len(self.processes), on_progress, on_exit)
        async with self.spawned:
            self.processes.append(process)
            self.spawned.notify_all()
        return process

    async def process(self, number: int) -> FakeProcess:
        async with asyncio.timeout(30), self.spawned:
            await self.spawned.wait_for(lambda: len(self.processes) > number)
        return self.processes[number]

    def begin(self, value: Plan, index: int, epoch: Epoch) -> asyncio.Task[list[cluster_pb2.StageProgress]]:
        async def collect() -> list[cluster_pb2.StageProgress]:
            return [progress async for progress in self.host.start(value, index, epoch)]

        return asyncio.create_task(collect())

    async def bring_up(self, value: Plan, index: int, epoch: Epoch) -> FakeProcess:
        task = self.begin(value, index, epoch)
        process = await self.process(len(self.processes))
        process.load.set_result(StageEvent("loaded", address="127.0.0.1:4711", memory_bytes=77))
        await task
        return process


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


TWO = plan({0: 2, 1: 4}, transport="ring")


async def test_a_start_tells_progress_and_ends_with_the_addresses(world: World) -> None:
    task = world.begin(TWO, 0, Epoch(1, 1))
    process = await world.process(0)
    process.on_progress(StageEvent("loading", done_bytes=5, total_bytes=9))
    await asyncio.sleep(0)
    process.load.set_result(StageEvent("loaded", address="0.0.0.0:4711", memory_bytes=77))
    *_, last = await task
    assert (last.state, last.address) == ("loaded", "mini1.local:4711")
    assert last.mlx_address.startswith("127.0.0.1:")
    (status,) = world.host.statuses()
    assert (status.state, status.pid, status.memory_bytes, status.start, status.end) == ("loaded", 100, 77, 0, 2)
    assert (status.done_bytes, status.total_bytes) == (5, 9)
    assert world.changes > 0


async def test_a_loaded_stage_tells_what_it_has_for_rows(world: World) -> None:
    task = world.begin(TWO, 0, Epoch(1, 1))
    process = await world.process(0)
    process.load.set_result(
        StageEvent("loaded", address="0.0.0.0:1", memory_bytes=400_000, kv_bytes_per_position=100, kv_fixed_bytes=7)
    )
    *_, last = await task
    assert last.kv_budget_bytes == 600_000
    assert _row_cost(last) == RowCost(100, 7, False, 600_000)


async def test_a_stage_whose_rows_cost_nothing_has_no_bound(world: World) -> None:
    task = world.begin(TWO, 0, Epoch(1, 1))
    process = await world.process(0)
    process.load.set_result(StageEvent("loaded", address="0.0.0.0:1"))
    *_, last = await task
    assert _row_cost(last).budget_bytes is None


async def test_links_get_the_command_and_the_state(world: World) -> None:
    process = await world.bring_up(TWO, 0, Epoch(1, 1))
    request = cluster_pb2.LinkStageRequest(
        pipeline="tiny", stage=0, epoch="1.1", transport="ring", stage_addresses=["a:1", "b:2"], mlx_addresses=["c:3"]
    )
    await world.host.link(request)
    assert process.commands == [LinkCommand("ring", ("a:1", "b:2"), ("c:3",), 7.0)]
    assert world.host.statuses()[0].state == "linked"


async def test_a_failed_link_ends_the_stage_with_its_reason(world: World) -> None:
    process = await world.bring_up(TWO, 0, Epoch(1, 1))
    process.link_error = LinkUnavailable("no ring here")
    with pytest.raises(LinkUnavailable, match="no ring here"):
        await world.host.link(cluster_pb2.LinkStageRequest(pipeline="tiny", stage=0, epoch="1.1", transport="ring"))
    assert process.stopped
    status = world.host.statuses()[0]
    assert (status.state, status.pid, status.detail) == ("failed", 0, "no ring here")


async def test_links_of_another_epoch_are_refused(world: World) -> None:
    await world.bring_up(TWO, 0, Epoch(1, 2))
    with pytest.raises(Fenced, match=r"1\.1 of tiny is older than 1\.2"):
        await world.host.link(cluster_pb2.LinkStageRequest(pipeline="tiny", stage=0, epoch="1.1"))
    with pytest.raises(StageStartError, match="is not here"):
        await world.host.link(cluster_pb2.LinkStageRequest(pipeline="tiny", stage=1, epoch="1.2"))


async def test_a_newer_epoch_replaces_the_older_one_also_while_it_loads(world: World) -> None:
    first = world.begin(TWO, 0, Epoch(1, 1))
    old = await world.process(0)
    second = world.begin(TWO, 0, Epoch(1, 2))
    new = await world.process(1)
    assert old.stopped
    with pytest.raises(ClusterError):
        await first
    new.load.set_result(StageEvent("loaded", address="127.0.0.1:1", memory_bytes=1))
    await second
    assert not new.stopped
    assert [s.epoch for s in world.host.statuses()] == [Epoch(1, 2)]


async def test_an_older_or_repeated_epoch_never_starts(world: World, tmp_path: Path) -> None:
    await world.bring_up(TWO, 0, Epoch(2, 1))
    for epoch in (Epoch(1, 9), Epoch(2, 1)):
        with pytest.raises(Fenced):
            await world.begin(TWO, 0, epoch)
    assert len(world.processes) == 1
    assert NodeState(tmp_path, "c").epochs == (("tiny", Epoch(2, 1)),), "the epoch outlives the agent"


async def test_a_caller_that_leaves_ends_the_start_and_frees_the_lease(world: World) -> None:
    for incarnation in range(1, 6):  # more often than there are ports to lease
        task = world.begin(TWO, 0, Epoch(1, incarnation))
        process = await world.process(incarnation - 1)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert process.stopped


async def test_a_process_that_ends_is_told_with_its_reason(world: World) -> None:
    process = await world.bring_up(TWO, 0, Epoch(1, 1))
    process.on_exit("killed by SIGKILL (out of memory?)")
    status = world.host.statuses()[0]
    assert (status.state, status.pid, status.memory_bytes) == ("failed", 0, 0)
    assert "SIGKILL" in status.detail
    assert world.host.num_running == 0


async def test_what_cannot_start_says_why(world: World) -> None:
    world.spec_error = CheckpointError("the plan wants another manifest")
    with pytest.raises(CheckpointError, match="another manifest"):
        await world.begin(TWO, 0, Epoch(1, 1))
    world.spec_error, world.start_error = None, StageStartError("no such program")
    with pytest.raises(StageStartError, match="no such program"):
        await world.begin(TWO, 0, Epoch(1, 2))
    assert world.host.statuses()[0].detail == "no such program"


async def test_a_load_that_fails_keeps_its_error(world: World) -> None:
    task = world.begin(TWO, 0, Epoch(1, 1))
    process = await world.process(0)
    process.load.set_exception(CheckpointError("a broken file"))
    with pytest.raises(CheckpointError, match="a broken file"):
        await task
    assert world.host.statuses()[0].detail == "a broken file"


async def test_stop_and_keep_only_end_what_is_not_wanted(world: World) -> None:
    one = await world.bring_up(plan({0: 2, 1: 4}, 3, "a"), 0, Epoch(3, 1))
    two = await world.bring_up(plan({0: 2, 1: 4}, 5, "b", transport="ring"), 0, Epoch(5, 1))
    three = await world.bring_up(plan({0: 2, 1: 4}, 6, "c"), 0, Epoch(6, 1))
    await world.host.keep_only([plan({0: 2, 1: 4}, 3, "a"), plan({0: 2, 1: 4}, 6, "b")])
    assert (one.stopped, two.stopped, three.stopped) == (False, True, True)
    await world.host.stop("a", 0, Epoch(2, 9), "an older epoch's wish")
    assert not one.stopped
    await world.host.stop("a", 0, Epoch(3, 1), "done")
    assert one.stopped
    assert world.host.statuses() == ()
    await world.host.stop("a", 0, Epoch(3, 1), "twice is fine")


async def test_stop_all_ends_everything(world: World) -> None:
    processes = [await world.bring_up(plan({0: 2, 1: 4}, 3, name), 0, Epoch(3, 1)) for name in "ab"]
    await world.host.stop_all()
    assert all(process.stopped for process in processes)


async def test_links_without_mlx_take_no_port(world: World) -> None:
    for number, name in enumerate("abcdef"):  # more pipelines than there are ports to lease
        await world.bring_up(plan({0: 2, 1: 4}, 3, name, transport="grpc"), 0, Epoch(3, number))


# -- processes that go on in another epoch -----------------------------------------------------------

GRPC = plan({0: 2, 1: 4}, transport="grpc")


async def again(world: World, value: Plan, index: int, epoch: Epoch, *, fresh: bool = False) -> FakeProcess | None:
    """Start a stage; gives the process that was started for it, None when one was kept."""
    before = len(world.processes)

    async def collect() -> list[str]:
        return [progress.address async for progress in world.host.start(value, index, epoch, fresh=fresh)]

    task = asyncio.create_task(collect())
    started = asyncio.create_task(world.process(before))
    await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
    if not started.done():
        started.cancel()
        assert task.result()[-1] == "mini1.local:4711"
        return None
    started.result().load.set_result(StageEvent("loaded", address="127.0.0.1:4711", memory_bytes=77))
    await task
    return started.result()


async def test_a_process_goes_on_in_the_next_epoch_with_what_it_holds(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    process.on_progress(StageEvent("ended", code="link_closed", message="stage 1 is gone"))
    (status,) = world.host.statuses()
    assert (status.state, status.pid, status.detail) == ("loaded", 100, "stage 1 is gone")
    assert await again(world, GRPC, 0, Epoch(1, 2)) is None
    assert not process.stopped
    assert process.spec.epoch == Epoch(1, 2)
    (status,) = world.host.statuses()
    assert (status.epoch, status.state, status.pid, status.memory_bytes) == (Epoch(1, 2), "loaded", 100, 55)
    process.on_exit("killed by SIGKILL")
    assert world.host.statuses()[0].state == "failed", "the new epoch hears how it ends"


async def test_an_older_epoch_is_not_linked_or_stopped_any_more_once_its_process_went_on(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    await again(world, GRPC, 0, Epoch(1, 2))
    with pytest.raises(Fenced):
        await world.host.link(cluster_pb2.LinkStageRequest(pipeline="tiny", stage=0, epoch="1.1"))
    with pytest.raises(Fenced):
        await world.begin(GRPC, 0, Epoch(1, 1))
    await world.host.stop("tiny", 0, Epoch(1, 1), "an old wish")
    assert not process.stopped
    await world.host.stop("tiny", 0, Epoch(1, 2), "the new one's")
    assert process.stopped


async def test_a_process_that_does_not_let_go_is_replaced(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    process.adopt_error = StageStartError("did not let go within 3 s")
    new = await again(world, GRPC, 0, Epoch(1, 2))
    assert process.stopped
    assert new is not None
    assert [(s.epoch, s.state, s.pid) for s in world.host.statuses()] == [(Epoch(1, 2), "loaded", new.pid)]


async def test_a_process_that_is_known_to_hang_is_not_asked(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    assert await again(world, GRPC, 0, Epoch(1, 2), fresh=True) is not None
    assert process.stopped
    assert process.grace_seconds < 1.0, "it does not hear SIGTERM either"


async def test_a_process_in_which_something_went_wrong_is_replaced(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    process.usable = False
    assert await again(world, GRPC, 0, Epoch(1, 2)) is not None
    assert process.stopped


async def test_links_of_mlx_need_fresh_processes(world: World) -> None:
    ring = await world.bring_up(TWO, 0, Epoch(1, 1))
    assert not ring.spec.keep
    assert await again(world, GRPC, 0, Epoch(1, 2)) is not None
    assert ring.stopped
    grpc = world.processes[-1]
    assert grpc.spec.keep
    assert await again(world, TWO, 0, Epoch(1, 3)) is not None
    assert grpc.stopped


async def test_a_newer_plan_takes_over_the_process_with_most_of_its_layers(world: World) -> None:
    process = await world.bring_up(GRPC, 1, Epoch(1, 1))
    wider = plan({1: 6}, 2, transport="inprocess")
    await world.host.keep_only([wider])
    assert not process.stopped, "the plan of the same node's next stage can go on with it"
    assert await again(world, wider, 0, Epoch(2, 1)) is None
    assert process.spec.layers == (0, 6)
    assert [(s.index, s.start, s.end) for s in world.host.statuses()] == [(0, 0, 6)], "one process, one line"


async def test_a_newer_plan_without_this_node_ends_what_it_holds(world: World) -> None:
    process = await world.bring_up(GRPC, 1, Epoch(1, 1))
    await world.host.keep_only([plan({0: 6}, 2, transport="inprocess")])
    assert process.stopped


async def test_a_caller_that_leaves_in_the_middle_leaves_the_process_to_the_next_attempt(world: World) -> None:
    """Another stage of the pipeline could not be started."""
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    process.adopting = asyncio.get_running_loop().create_future()
    task = world.begin(GRPC, 0, Epoch(1, 2))
    while not world.host.statuses() or world.host.statuses()[0].epoch != Epoch(1, 2):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    process.adopting.set_result(None)
    await asyncio.gather(task, return_exceptions=True)
    (status,) = world.host.statuses()
    assert (status.epoch, status.state, status.pid, status.memory_bytes) == (Epoch(1, 2), "loaded", 100, 77)
    process.adopting = None
    assert await again(world, GRPC, 0, Epoch(1, 3)) is None
    assert not process.stopped


async def test_a_caller_that_leaves_before_it_heard_that_all_is_loaded_does_the_same(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    starting = world.host.start(GRPC, 0, Epoch(1, 2))
    progress = await anext(starting)
    assert progress.state == "loading"
    await starting.aclose()
    assert not process.stopped
    assert await again(world, GRPC, 0, Epoch(1, 3)) is None


async def test_a_process_that_does_not_let_go_of_a_caller_that_left_is_gone(world: World) -> None:
    process = await world.bring_up(GRPC, 0, Epoch(1, 1))
    process.adopting = asyncio.get_running_loop().create_future()
    task = world.begin(GRPC, 0, Epoch(1, 2))
    while not world.host.statuses() or world.host.statuses()[0].epoch != Epoch(1, 2):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    process.stopped = True
    process.adopting.set_exception(StageStartError("did not let go"))
    await asyncio.gather(task, return_exceptions=True)
    assert world.host.num_running == 0
    assert await again(world, GRPC, 0, Epoch(1, 3)) is not None
