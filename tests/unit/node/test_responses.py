"""A response is found from any gateway: two gateways, each with its own store, and the real gRPC between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from mlx_cluster.cluster.rpc import open_channel
from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.errors import ConfigError
from mlx_cluster.gateway.app import NodeInfo, create_app
from mlx_cluster.gateway.server import GatewayServer
from mlx_cluster.node.responses import OtherNodes, ResponsesService
from mlx_cluster.tokenizer import Tokenizer, load
from tests.fake_engine import Script, ScriptedEngine, ScriptedRoutes, served_model, write_byte_level_tokenizer

PATH = "/v1/responses"


class Node:
    """One gateway, its engine, and its comms server."""

    def __init__(self, node_id: int, directory: Path, tokenizer: Tokenizer, elsewhere: OtherNodes) -> None:
        self.engine = ScriptedEngine(Script(tokens=[*tokenizer.encode("hello"), *tokenizer.eos_token_ids]))
        routes = ScriptedRoutes([served_model(directory, max_context=2048)], {"tiny": self.engine})
        self.app = create_app(routes, ApiGatewaySection(), NodeInfo(node_id, f"mini{node_id}"), elsewhere=elsewhere)
        self.http = GatewayServer(self.app, "127.0.0.1", 0)
        self.comms = grpc.aio.server()
        ResponsesService("c", self.app.state.shelf).add_to(self.comms)
        self.port = self.comms.add_insecure_port("127.0.0.1:0")


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncIterator[tuple[list[Node], list[httpx.AsyncClient]]]:
    directory = write_byte_level_tokenizer(folder / "tokenizer")
    tokenizer = load(directory)
    addresses: dict[int, str] = {}
    channels: dict[str, grpc.aio.Channel] = {}

    def channel(address: str) -> grpc.aio.Channel:
        return channels.setdefault(address, open_channel(address))

    nodes = [Node(node_id, directory, tokenizer, OtherNodes("c", addresses, channel)) for node_id in (0, 1)]
    async with AsyncExitStack() as stack:
        clients = []
        for node_id, node in enumerate(nodes):
            await node.comms.start()
            addresses[node_id] = f"127.0.0.1:{node.port}"
            stack.push_async_callback(node.comms.stop, 0)
            await node.http.start()
            stack.push_async_callback(node.http.stop, 0)
            base = f"http://127.0.0.1:{node.http.port}"
            clients.append(await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=60)))
        try:
            yield nodes, clients
        finally:
            for opened in channels.values():
                await opened.close()


async def create(client: httpx.AsyncClient, **changes: Any) -> Any:
    answer = await client.post(PATH, json={"model": "tiny", "input": "hi", **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_response_is_found_from_any_gateway(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (nodes, (here, there)):
        first = await create(there)
        found = (await here.get(f"{PATH}/{first['id']}")).json()
        assert (found["id"], found["output"]) == (first["id"], first["output"])
        assert len((await here.get(f"{PATH}/{first['id']}/input_items")).json()["data"]) == 1
        # A conversation that changes its gateway with each turn.
        second = await create(here, previous_response_id=first["id"])
        await create(there, previous_response_id=second["id"])
        prompts = [len(nodes[0].engine.requests[0].prompt), len(nodes[1].engine.requests[1].prompt)]
        assert prompts[1] > prompts[0] > len(nodes[1].engine.requests[0].prompt)
        assert (await here.post(f"{PATH}/{first['id']}/cancel")).status_code == 400  # it ran in no background
        assert (await here.delete(f"{PATH}/{first['id']}")).json()["deleted"]
        assert (await there.get(f"{PATH}/{first['id']}")).status_code == 404
        assert (await here.get(f"{PATH}/{first['id']}")).status_code == 404
        unknown = first["id"].replace("resp_1_", "resp_9_")
        assert (await here.get(f"{PATH}/{unknown}")).status_code == 404


async def test_a_node_that_cannot_be_reached_is_a_503(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (nodes, (here, there)):
        first = await create(there)
        await nodes[1].comms.stop(0)
        answer = await here.get(f"{PATH}/{first['id']}")
        assert answer.status_code == 503
        assert "node 1 keeps this response" in answer.json()["error"]["message"]


async def test_another_cluster_is_told_nothing(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (nodes, (_, there)):
        first = await create(there)
        stranger = OtherNodes("other", {1: f"127.0.0.1:{nodes[1].port}"}, open_channel)
        with pytest.raises(ConfigError, match="belongs to the cluster 'c'"):
            await stranger.ask(1, "get", first["id"])
