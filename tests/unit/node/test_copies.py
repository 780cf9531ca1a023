"""A node that lacks a model gets it: from a peer, else by one download for all; with pauses after failures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import CheckpointError
from mlx_cluster.node.copies import Copies, weights_service
from mlx_cluster.node.models import LocalModels
from tests.unit.cluster.builders import status


def configured(path: str, policy: str = "fetch") -> Settings:
    return Settings.model_validate(
        {
            "cluster": {"name": "c", "nodes": [{"host": f"mini{i}", "node_id": i} for i in range(3)]},
            "models": {"tiny": {"path": path}},
            "runtime": {"missing_models": policy},
        }
    )


@pytest.fixture
async def peer(tiny_model: Path) -> AsyncIterator[NodeStatus]:
    """A node that has the model, and gives it away."""
    settings = configured(str(tiny_model))
    models = LocalModels(settings, settings.cluster.nodes[0])
    await models.refresh()
    server = grpc.aio.server()
    weights_service("c", models).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield replace(status(0), comms_address=f"127.0.0.1:{port}", models=models.facts)
    await server.stop(None)


class World:
    """Node 1, which lacks ``path``; ``living`` are the others."""

    def __init__(self, folder: Path, path: str, policy: str = "fetch") -> None:
        settings = configured(path, policy)
        self.models = LocalModels(settings, settings.cluster.nodes[1], folder)
        self.living: list[NodeStatus] = []
        self.downloads: list[str] = []
        self.download: Callable[[str], Path] = self._refuse
        self.channels: list[grpc.aio.Channel] = []
        self.copies = Copies(settings, 1, self.models, lambda: self.living, self._channel, lambda p: self.download(p))

    def _refuse(self, path: str) -> Path:
        self.downloads.append(path)
        raise CheckpointError("no network")

    def _channel(self, address: str) -> grpc.aio.Channel:
        self.channels.append(grpc.aio.insecure_channel(address))
        return self.channels[-1]

    async def look(self) -> None:
        await self.models.refresh()
        await self.copies.look_once()
        for channel in self.channels:
            await channel.close()
        self.channels.clear()


async def test_a_missing_model_is_copied_from_a_peer_and_found_again_after_a_restart(
    peer: NodeStatus, tmp_path: Path
) -> None:
    world = World(tmp_path, "org/tiny")
    world.living = [peer]
    await world.look()
    assert world.models.facts == peer.models
    found = world.models.get("tiny")
    assert found is not None
    assert found.directory.parent == tmp_path
    again = World(tmp_path, "org/tiny")
    await again.models.refresh()
    assert again.models.facts == peer.models
    assert world.downloads == []


async def test_a_peer_that_cannot_give_it_costs_a_pause(peer: NodeStatus, tmp_path: Path) -> None:
    world = World(tmp_path, "org/tiny")
    assert peer.models
    world.living = [replace(peer, models=(replace(peer.models[0], manifest_hash="another"),))]
    await world.look()
    assert world.models.get("tiny") is None
    world.living = [peer]
    await world.look()
    assert world.models.get("tiny") is None, "not at once"


async def test_only_the_lowest_node_that_lacks_it_downloads(tmp_path: Path) -> None:
    lacking = replace(status(0, models=()), missing=(("tiny", "not here"),))
    world = World(tmp_path, "org/tiny")
    world.living = [lacking, replace(lacking, node_id=1)]
    await world.look()
    assert world.downloads == []
    world.living = [replace(lacking, node_id=1), replace(lacking, node_id=2)]
    await world.look()
    assert world.downloads == ["org/tiny"]
    await world.look()
    assert world.downloads == ["org/tiny"], "a failure is followed by a pause"


@pytest.mark.parametrize(("path", "policy"), [("/models/tiny", "fetch"), ("org/tiny", "peers")])
async def test_what_is_no_repository_or_not_wished_is_not_downloaded(tmp_path: Path, path: str, policy: str) -> None:
    world = World(tmp_path, path, policy)
    world.living = [replace(status(1, models=()), missing=(("tiny", "not here"),))]
    await world.look()
    assert world.downloads == []
