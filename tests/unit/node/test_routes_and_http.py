from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.status import PipelineState, PipelineStatus
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ModelNotFound, Recovering, Unavailable
from mlx_cluster.metrics import Metrics
from mlx_cluster.node.http import admin_app, health_app, node_app
from mlx_cluster.node.models import LocalModels
from mlx_cluster.node.routes import NodeRoutes, Picture
from mlx_cluster.plan import Epoch
from mlx_cluster.request import Engine, Event, SequenceRequest
from tests.unit.cluster.builders import members, plan, status, view

PLAN = plan({0: 2, 1: 4}, version=3)


class NamedEngine:
    def __init__(self, name: str) -> None:
        self.name = name

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        raise NotImplementedError


class World:
    """The routes of node ``self_id``, over a picture that the test sets."""

    def __init__(self, models: LocalModels, settings: Settings) -> None:
        self.settings = settings
        self.state: PipelineState = "ready"
        self.self_id = 1
        self.local: Engine | None = None
        self.served: set[str] = set()
        self.routes = NodeRoutes(
            settings.models,
            models,
            self.picture,
            lambda _: self.local,
            lambda address, pipeline: NamedEngine(f"{address}/{pipeline}"),
            lambda model_id: model_id in self.served,
        )

    def picture(self) -> Picture:
        driver = PipelineStatus(PLAN, Epoch(3, 1), self.state, "why not")
        nodes = {0: status(0, pipelines=(driver,)), 1: status(1)}
        document = ClusterDocument("c", 1, 3, tuple(members(2)), (PLAN,))
        return view(self.self_id, dict(nodes)), Leadership(0, 1), document


@pytest.fixture
async def world(tiny_model: Path) -> World:
    settings = Settings.model_validate(
        {
            "cluster": {"nodes": [{"host": "mini0", "node_id": 0}]},
            "models": {"tiny": {"path": str(tiny_model), "aliases": ["small"]}, "absent": {"path": "/nowhere"}},
        }
    )
    models = LocalModels(settings, settings.cluster.nodes[0])
    await models.refresh()
    return World(models, settings)


def test_a_remote_engine_is_dialled_at_its_nodes_comms_port(world: World) -> None:
    engine = world.routes.engine_for("tiny")
    assert isinstance(engine, NamedEngine)
    assert engine.name == "10.0.0.0:8101/tiny"


def test_the_own_engine_is_used_where_it_is(world: World) -> None:
    world.self_id, world.local = 0, NamedEngine("here")
    assert world.routes.engine_for("tiny") is world.local
    world.local = None
    with pytest.raises(Unavailable, match="tiny"):
        world.routes.engine_for("tiny")


@pytest.mark.parametrize("state", ["loading", "failed"])
def test_no_engine_before_ready(world: World, state: PipelineState) -> None:
    world.state = state
    with pytest.raises(Unavailable, match=f"tiny is {state}: why not"):
        world.routes.engine_for("tiny")


def test_what_served_before_is_worth_waiting_for(world: World) -> None:
    world.state = "loading"
    with pytest.raises(Unavailable) as refused:
        world.routes.engine_for("tiny")
    assert not isinstance(refused.value, Recovering)
    world.served.add("tiny")
    with pytest.raises(Recovering, match="tiny is loading: why not"):
        world.routes.engine_for("tiny")


def test_unknown_models_name_the_known_ones(world: World) -> None:
    with pytest.raises(ModelNotFound, match="'huge' does not exist; models of this cluster: tiny, absent"):
        world.routes.engine_for("huge")


def test_models_carry_this_nodes_own_directory(world: World, tiny_model: Path) -> None:
    tiny, absent = world.routes.models()
    assert (tiny.model_dir, tiny.aliases, tiny.state, tiny.max_context) == (str(tiny_model), ("small",), "ready", 4096)
    assert tiny.created > 0
    assert (absent.state, absent.model_dir) == ("failed", "")
    assert "/nowhere" in absent.detail


async def get(app: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as client:
        return await client.get(path)


async def test_admin_routes(world: World) -> None:
    app = admin_app("c", world.settings, world.picture, world.routes)
    assert (await get(app, "/cluster")).json()["pipelines"][0]["state"] == "ready"
    assert len((await get(app, "/nodes")).json()["nodes"]) == 2
    assert (await get(app, "/plan")).json()["version"] == 3
    assert [m["id"] for m in (await get(app, "/models")).json()["models"]] == ["tiny", "absent"]
    assert (await get(app, "/config")).json()["coordinator"]["port"] == 8400
    assert (await get(app, "/other")).status_code == 404


async def test_the_node_api_shows_this_node() -> None:
    app = node_app(lambda: status(1), lambda: {("m", "m#1"): {"waiting": 2, "held": [(1, 4)]}})
    assert (await get(app, "/node")).json()["name"] == "mini1"
    assert (await get(app, "/stages")).json() == {"stages": []}
    assert (await get(app, "/memory")).json()["stages_bytes"] == 0
    expected = {"model": "m", "pipeline": "m#1", "waiting": 2, "held": [[1, 4]]}
    assert (await get(app, "/engines")).json() == {"engines": [expected]}


async def test_health_is_ready_only_while_a_model_is(world: World) -> None:
    app = health_app(lambda: status(1), world.routes, Metrics())
    assert (await get(app, "/livez")).status_code == 200
    assert (await get(app, "/readyz")).status_code == 200
    assert (await get(app, "/health")).json()["status"] == "ok"
    assert "mlx_cluster_gateway" in (await get(app, "/metrics")).text
    world.state = "failed"
    assert (await get(app, "/livez")).status_code == 200
    answer = await get(app, "/readyz")
    assert (answer.status_code, "tiny is failed (why not)" in answer.text) == (503, True)
    assert (await get(app, "/health")).status_code == 503
