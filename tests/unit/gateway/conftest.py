"""A real gateway on a free loopback port, in front of a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio
from fastapi import FastAPI

from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.gateway.app import NodeInfo, create_app
from mlx_cluster.gateway.server import GatewayServer
from mlx_cluster.metrics import Metrics
from mlx_cluster.request import SequenceRequest
from mlx_cluster.tokenizer import Tokenizer, load
from tests.fake_engine import Script, ScriptedEngine, ScriptedRoutes, served_model, write_byte_level_tokenizer


@dataclass
class World:
    """A running gateway, its engine, and clients for it."""

    routes: ScriptedRoutes
    metrics: Metrics
    url: str
    tokenizer: Tokenizer
    sdk: openai.AsyncOpenAI
    http: httpx.AsyncClient
    app: FastAPI

    def engine(
        self, script: Script | Callable[[SequenceRequest], Script] | None = None, *, text: str = ""
    ) -> ScriptedEngine:
        """Put a fresh engine behind the model "tiny"; ``text`` is what it says, followed by the end token."""
        if script is None:
            script = Script(tokens=[*self.tokenizer.encode(text), *self.tokenizer.eos_token_ids])
        engine = ScriptedEngine(script)
        self.routes.engines["tiny"] = engine
        return engine

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"mlx_cluster_gateway_{name}", labels) or 0.0


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level, with a few words as single tokens."""
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("Ġ", "w"), ("S", "T"), ("O", "P")]
    return write_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"), merges=merges)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load(tokenizer_dir)


@asynccontextmanager
async def running(tokenizer_dir: Path, tokenizer: Tokenizer, **settings: object) -> AsyncIterator[World]:
    settings = {"recovery_timeout": 0.2, **settings}  # a lost engine is given up soon
    routes = ScriptedRoutes(
        [
            served_model(tokenizer_dir),
            served_model(tokenizer_dir, id="org/late", aliases=(), state="loading", detail="stage 1 of 3"),
        ],
        {},
    )
    metrics = Metrics()
    app = create_app(routes, ApiGatewaySection(**settings), NodeInfo(0, "mini1"), metrics)  # type: ignore[arg-type]
    server = GatewayServer(app, "127.0.0.1", 0)
    await server.start()
    url = f"http://127.0.0.1:{server.port}"
    try:
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as sdk,
            httpx.AsyncClient(base_url=url, timeout=60) as http,
        ):
            yield World(routes, metrics, url, tokenizer, sdk, http, app)
    finally:
        await server.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    """One gateway for a whole file: tests put their own engine into it."""
    async with running(tokenizer_dir, tokenizer, max_body_bytes=64 * 1024, max_concurrent_requests=4) as made:
        yield made
