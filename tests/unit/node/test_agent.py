"""Several agents in one process: real heartbeats and gRPC between them, scripted stage processes and engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlx_cluster.cluster.rpc import ClusterClient, ClusterService, open_channel
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ClusterError, Fenced
from mlx_cluster.node.agent import Agent
from mlx_cluster.node.bringup import Timing
from mlx_cluster.node.identity import identify
from mlx_cluster.node.models import LocalModels
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.request import Event, SequenceRequest
from mlx_cluster.stage.spec import LinkCommand, StageEvent, StageSpec
from tests.e2e.cluster_processes import free_block

PATIENCE_SECONDS = 60.0


class ScriptedStage:
    """Loads and links at once; the test may kill it."""

    def __init__(self, spec: StageSpec, on_exit: Callable[[str], None]) -> None:
        self.spec, self.on_exit = spec, on_exit
        self.pid = 4000 + spec.index
        self.commands: list[LinkCommand] = []
        self.stopped = False

    async def loaded(self) -> StageEvent:
        return StageEvent("loaded", address=f"127.0.0.1:{5000 + self.spec.index}", memory_bytes=10)

    async def link(self, command: LinkCommand) -> None:
        assert command.transport == self.spec.plan.transport
        self.commands.append(command)

    def can_become(self, spec: StageSpec) -> bool:
        return self.spec.can_become(spec) and not self.stopped

    async def adopt(
        self, spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> None:
        self.spec, self.on_exit = spec, on_exit

    async def stop(self, grace_seconds: float = 0.0) -> None:
        self.stopped = True


class ScriptedEngine:
    def __init__(self, plan: Plan, epoch: Epoch, addresses: Sequence[str]) -> None:
        self.plan, self.epoch, self.addresses = plan, epoch, addresses
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.hung: int | None = None
        self.stopped_with: ClusterError | None = None
        self.running, self.step_seconds = 0, ()

    async def start(self, timeout_seconds: float) -> None: ...

    async def canary(self, timeout_seconds: float) -> None: ...

    async def stop(self, error: ClusterError | None = None) -> None:
        self.stopped_with = error

    def statistics(self) -> dict[str, Any]:
        return {}

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        raise NotImplementedError


class Node:
    """One agent with its comms port; ``stages`` and ``engines`` in the order in which they were made."""

    def __init__(self, settings: Settings, node_id: int, models: LocalModels) -> None:
        self.stages: list[ScriptedStage] = []
        self.engines: list[ScriptedEngine] = []
        self.agent = Agent(
            settings,
            identify(settings, str(node_id)),
            models,
            start_process=self.start_stage,
            make_engine=self.make_engine,
            timing=Timing(first_pause_seconds=0.01, longest_pause_seconds=0.05),
        )
        self.server = grpc.aio.server()
        ClusterService(self.agent, settings.cluster.name, self.agent.version).add_to(self.server)
        self.server.add_insecure_port(f"127.0.0.1:{self.agent.identity.ports.comms}")
        self.task: asyncio.Task[None] | None = None

    async def start_stage(
        self, spec: StageSpec, *, on_progress: Callable[[StageEvent], None], on_exit: Callable[[str], None]
    ) -> ScriptedStage:
        self.stages.append(ScriptedStage(spec, on_exit))
        return self.stages[-1]

    def make_engine(self, plan: Plan, epoch: Epoch, addresses: Sequence[str], _costs: object) -> ScriptedEngine:
        self.engines.append(ScriptedEngine(plan, epoch, addresses))
        return self.engines[-1]

    async def start(self) -> None:
        await self.server.start()
        self.task = asyncio.create_task(self.agent.run())

    async def stop(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.agent.stop(1.0)
            await self.server.stop(None)

    def ready_plan(self) -> Plan | None:
        """The plan that this node sees as ready."""
        view, _, document = self.agent.picture()
        for plan in document.plans:
            node = view.node(plan.engine_node_id)
            for pipeline in node.status.pipelines if node and node.status and node.state != "dead" else ():
                if pipeline.state == "ready" and pipeline.plan.version == plan.version:
                    return pipeline.plan
        return None


async def until(what: str, probe: Callable[[], Any]) -> Any:
    """The first value of ``probe`` that is true; agents act by themselves, so this can only look again."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (value := probe()):
                await asyncio.sleep(0.02)
            return value
    except TimeoutError:
        raise AssertionError(f"{what} did not happen") from None


class Cluster:
    def __init__(self, folder: Path, model: Path, count: int, split: str | None, fixed: str | None = None) -> None:
        base = free_block(10 * count)
        self.settings = Settings.model_validate(
            {
                "cluster": {
                    "name": "agents",
                    "nodes": [
                        {"host": "127.0.0.1", "name": f"mini{i}", "node_id": i, "ports": [base + 5 * i]}
                        for i in range(count)
                    ],
                },
                "coordinator": {
                    "heartbeat_interval": 0.1,
                    "failure_threshold": 10,
                    "port": base + 10 * count - 1,
                    "fixed": fixed,
                },
                "api_gateway": {"port": base + 5 * count},
                "nodes": {f"mini{i}": {"state_dir": str(folder / str(i))} for i in range(count)},
                "models": {"tiny": {"path": str(model), "split": split}},
            }
        )
        self.nodes: dict[int, Node] = {}

    async def start(self, *node_ids: int) -> None:
        for node_id in node_ids:
            models = LocalModels(self.settings, self.settings.cluster.nodes[node_id])
            await models.refresh()
            self.nodes[node_id] = Node(self.settings, node_id, models)
            await self.nodes[node_id].start()

    async def ready(self, *node_ids: int) -> Plan:
        plans = [await until(f"node {i} ready", self.nodes[i].ready_plan) for i in node_ids]
        return plans[-1]


@asynccontextmanager
async def cluster(
    folder: Path, model: Path, count: int, split: str | None = None, fixed: str | None = None
) -> AsyncIterator[Cluster]:
    made = Cluster(folder, model, count, split, fixed)
    try:
        await made.start(*range(count))
        yield made
    finally:
        for node in made.nodes.values():
            await node.stop()


async def test_agents_find_each_other_and_bring_a_plan_up(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 3) as three:
        plan = await three.ready(0, 1, 2)
        assert [s.node_id for s in plan.stages] == [0, 1, 2]
        assert plan.transport in ("grpc", "ring")
        for node in three.nodes.values():
            _, leadership, document = node.agent.picture()
            assert leadership.node_id in (0, 1, 2)
            assert document == three.nodes[0].agent.picture()[2]
            assert (document.era, document.term, document.plans) == (1, 1, (plan,))
            (stage,) = node.stages
            assert stage.spec.model_dir == str(tiny_model)
        (engine,) = three.nodes[0].engines
        assert list(engine.addresses) == ["127.0.0.1:5000", "127.0.0.1:5001", "127.0.0.1:5002"]
        assert three.nodes[0].agent.drivers.engine("tiny") is engine
        assert three.nodes[1].agent.drivers.engine("tiny") is None


async def test_a_lost_engine_comes_back_over_the_stages_that_live(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 2) as two:
        plan = await two.ready(0, 1)
        engine = two.nodes[0].engines[0]
        engine.lost_reason = "stage 1 is gone"
        engine.lost.set()
        await until("a second engine", lambda: len(two.nodes[0].engines) == 2)
        await two.ready(0, 1)
        assert [e.epoch for e in two.nodes[0].engines] == [Epoch(plan.version, 1), Epoch(plan.version, 2)]
        (recovery,) = two.nodes[0].agent.history.recoveries
        assert (recovery.epoch, recovery.cause) == (f"{plan.version}.2", "stage 1 is gone")
        assert two.nodes[1].agent.history.recoveries == (), "it does not drive"
        for node in two.nodes.values():
            (stage,) = node.stages
            assert not stage.stopped
            assert stage.spec.epoch == Epoch(plan.version, 2)
            assert len(stage.commands) == 2, "linked again in the new epoch"


async def test_a_stage_that_hung_is_started_afresh(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 2) as two:
        await two.ready(0, 1)
        engine = two.nodes[0].engines[0]
        engine.lost_reason, engine.hung = "stage 1 is silent", 1
        engine.lost.set()
        await until("a second engine", lambda: len(two.nodes[0].engines) == 2)
        await two.ready(0, 1)
        (kept,) = two.nodes[0].stages
        hung, fresh = two.nodes[1].stages
        assert (kept.stopped, hung.stopped, fresh.stopped) == (False, True, False)


async def test_another_node_takes_over_and_the_one_that_comes_back_only_follows(
    tmp_path: Path, tiny_model: Path
) -> None:
    async with cluster(tmp_path, tiny_model, 3) as three:
        before = await three.ready(0, 1, 2)
        term = three.nodes[1].agent.picture()[1].term
        await three.nodes[0].stop()
        plan = await until("a plan over the survivors", lambda: without(three.nodes[1], 0))
        assert plan.version > before.version
        leader = next(i for i in (1, 2) if three.nodes[i].agent.leads)
        leadership = three.nodes[leader].agent.picture()[1]
        assert leadership.term > term
        await three.start(0)
        assert await three.ready(0) == plan, "a plan that runs goes on"
        await until("it follows", lambda: three.nodes[0].agent.picture()[1] == leadership)
        assert three.nodes[0].stages == []
        assert len(three.nodes[plan.engine_node_id].engines) == 2 - (plan.engine_node_id != before.engine_node_id)


async def test_a_coordinator_that_dies_without_a_stage_disturbs_nothing(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 3, split="0/3/3") as three:
        plan = await three.ready(0, 1, 2)
        assert three.nodes[0].agent.leads
        assert [s.node_id for s in plan.stages] == [1, 2]
        engine = three.nodes[1].agent.drivers.engine("tiny")
        await three.nodes[0].stop()
        await until("another coordinator", lambda: three.nodes[1].agent.leads or three.nodes[2].agent.leads)

        def committed() -> bool:
            _, leadership, document = three.nodes[1].agent.picture()
            return leadership.node_id in (1, 2) and document.term == leadership.term

        await until("the document under its own term", committed)
        assert three.nodes[1].agent.picture()[2].plans == (plan,), "what runs is adopted"
        assert three.nodes[1].agent.drivers.engine("tiny") is engine
        assert [len(three.nodes[i].stages) for i in (1, 2)] == [1, 1]
        assert not any(three.nodes[i].stages[0].stopped for i in (1, 2))


async def test_a_node_that_refuses_connections_is_not_waited_for(tmp_path: Path, tiny_model: Path) -> None:
    three = Cluster(tmp_path, tiny_model, 3, None)
    # The deadline of silence is longer than the test's patience.
    patient = three.settings.coordinator.model_copy(update={"failure_threshold": 10_000})
    three.settings = three.settings.model_copy(update={"coordinator": patient})
    try:
        await three.start(0, 1, 2)
        await three.ready(0, 1, 2)
        node, task = three.nodes[2], three.nodes[2].task
        assert task is not None
        # Its port is closed, and its heartbeats end without a word of farewell.
        task.cancel()
        await node.server.stop(None)
        plan = await until("a plan over the survivors", lambda: without(three.nodes[0], 2))
        assert {s.node_id for s in plan.stages} == {0, 1}
        row = three.nodes[0].agent.picture()[0].node(2)
        assert row is not None
        assert (row.state, row.detail) == ("dead", "refuses connections")
    finally:
        for node in three.nodes.values():
            await node.stop()


def without(node: Node, gone: int) -> Plan | None:
    plan = node.ready_plan()
    return plan if plan is not None and gone not in {s.node_id for s in plan.stages} else None


async def test_epochs_rise_over_a_restart_of_everything(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 1) as one:
        plan = await one.ready(0)
        first = one.nodes[0].engines[0].epoch
        assert first == Epoch(plan.version, 1)
        term = one.nodes[0].agent.picture()[1].term
    async with cluster(tmp_path, tiny_model, 1) as one:
        await one.ready(0)
        assert one.nodes[0].engines[0].epoch > first
        assert one.nodes[0].agent.picture()[1].term > term


async def test_an_agent_starts_only_what_its_document_says(tmp_path: Path, tiny_model: Path) -> None:
    async with cluster(tmp_path, tiny_model, 2) as two:
        plan = await two.ready(0, 1)
        address = two.nodes[1].agent.identity.comms_address
        async with open_channel(address) as channel:
            client = ClusterClient(channel, "agents", "mini1")

            async def refused(value: Plan, index: int, epoch: Epoch) -> str:
                with pytest.raises(Fenced) as error:
                    async for _ in client.start_stage(value, index, epoch, False, 30.0):
                        pass
                return str(error.value)

            other = replace(plan, model=replace(plan.model, manifest_hash="another"))
            version = plan.version
            assert "does not start plan" in await refused(other, 1, Epoch(version, 9))
            assert "is not mini1's" in await refused(plan, 0, Epoch(version, 9))
            assert "older than" in await refused(plan, 1, Epoch(version, 0))
            assert "is not mini1's" in await refused(plan, 1, Epoch(version + 7, 1))
        assert len(two.nodes[1].stages) == 1


async def test_everything_goes_to_the_address_that_is_dialled(tmp_path: Path, tiny_model: Path) -> None:
    """Votes, heartbeats, documents, stages and the data between them; each sender by its own ranking."""
    two = Cluster(tmp_path, tiny_model, 2, "3/3")
    base = two.settings.cluster.nodes[0].ports[0]
    # Nothing listens at the configured hosts: 127.0.0.9 stands for a cable that is cut.
    entries = [{"host": "127.0.0.9", "name": f"mini{i}", "node_id": i, "ports": [base + 5 * i]} for i in range(2)]
    data = two.settings.model_dump(mode="json", exclude_unset=True)
    data["cluster"]["nodes"] = entries
    for i in range(2):
        data["nodes"][f"mini{i}"] |= {"bind": "127.0.0.1", "addresses": ["127.0.0.1"]}
    data["network"] = {"transport": "grpc"}
    two.settings = Settings.model_validate(data)
    try:
        for i in range(2):
            models = LocalModels(two.settings, two.settings.cluster.nodes[i])
            await models.refresh()
            two.nodes[i] = node = Node(two.settings, i, models)
            ranked = node.agent.addresses.ranked[1 - i]
            ranked.measured(ranked.candidates[0], 0.001)
            assert ranked.rank()
            await node.start()
        await two.ready(0, 1)
        (first,), (second,) = two.nodes[0].stages, two.nodes[1].stages
        assert first.commands[0].stage_addresses == ("127.0.0.9:5000", "127.0.0.1:5001")
        assert second.commands[0].stage_addresses == ("127.0.0.1:5000", "127.0.0.9:5001")
        (engine,) = two.nodes[0].engines
        assert list(engine.addresses) == ["127.0.0.9:5000", "127.0.0.1:5001"]
        await until(
            "mini0 hears of mini1's round trip",
            lambda: [i for s in two.nodes[0].agent.view.living if s.node_id == 1 for i, _ in s.round_trips] == [0],
        )
    finally:
        for node in two.nodes.values():
            await node.stop()
