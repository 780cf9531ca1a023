"""20,000 mutated requests over all routes: the process survives, every answer is well formed, memory stays.

A failing run prints its seed and the request; ``MLX_CLUSTER_FUZZ_SEED`` repeats it, ``MLX_CLUSTER_FUZZ_BODIES`` sets
how many are sent.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.gateway.app import NodeInfo, create_app
from mlx_cluster.request import SequenceRequest
from mlx_cluster.tokenizer import load
from tests.fake_engine import Script, ScriptedEngine, ScriptedRoutes, served_model, write_byte_level_tokenizer
from tests.fuzz.answers import Got, check, exchange
from tests.fuzz.mutate import Sent, mutated
from tests.fuzz.seeds import SEEDS, seeds_of

BODIES = int(os.environ.get("MLX_CLUSTER_FUZZ_BODIES", "20000"))
SEED = int(os.environ.get("MLX_CLUSTER_FUZZ_SEED", "20261121"))
# Between the first quarter and the end of a run; a leak of a hundred bytes a request would show.
MAX_GROWTH_BYTES = 1_500_000
GET_TAILS = ("", "?limit=0", "?limit=5&order=asc", "?after_id=x", "?stream=true", "?limit=%ff")
TEXTS = (
    "hello",
    "",
    'x <tool_call>\n{"name": "look", "arguments": {"name": "y"}}\n</tool_call>',
    "<tool_call>\n{",
    "<think>hm</think> STOP yes",
    "é漢🎉 STOP",
    '{"name": "x"}',
)


class Target:
    """A gateway without a server, in front of an engine that says one of a few texts."""

    def __init__(self, folder: Path) -> None:
        directory = write_byte_level_tokenizer(folder / "tokenizer", merges=[("h", "e"), ("l", "l")])
        tokenizer = load(directory)
        scripts = [[*tokenizer.encode(text), *tokenizer.eos_token_ids] for text in TEXTS]

        def script(request: SequenceRequest) -> Script:
            # Whatever bytes a token stands for may come: half characters too.
            turn = sum(request.prompt) % (len(scripts) + 1)
            return Script(
                tokens=scripts[turn] if turn < len(scripts) else [3 + id_ % 256 for id_ in request.prompt[:9]]
            )

        self.engine = ScriptedEngine(script)
        self.routes = ScriptedRoutes([served_model(directory, max_context=4096)], {"tiny": self.engine})
        settings = ApiGatewaySection(max_body_bytes=256 * 1024, max_concurrent_requests=4)
        self.app = create_app(self.routes, settings, NodeInfo(0, "mini1"), state_dir=folder)
        self.posts = sorted({r.path for r in self.app.routes if isinstance(r, APIRoute) and "POST" in r.methods})
        self.others = sorted(
            (method, r.path)
            for r in self.app.routes
            if isinstance(r, APIRoute)
            for method in r.methods - {"POST"}
            if r.path != "/metrics"
        )

    async def send(self, sent: Sent) -> tuple[Got, str]:
        got = await exchange(self.app, sent)
        kind = check(sent, got) if sent.method != "HEAD" else "head"
        self.engine.requests.clear()
        self.engine.finished.clear()
        self.engine.cancelled.clear()
        return got, kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _requests(target: Target, chance: random.Random, count: int) -> Any:
    for _ in range(count):
        if chance.random() < 0.05:
            method, path = chance.choice(target.others)
            tail, _, query = (path + chance.choice(GET_TAILS)).partition("?")
            filled = tail
            while "{" in filled:
                start, _, rest = filled.partition("{")
                value = chance.choice(("x", "tiny", "resp_0_" + "a" * 48, "resp_7_" + "b" * 48, "é", ".."))
                filled = start + value + rest.partition("}")[2]
            yield Sent(method, filled, b"", query, (), made_by="other")
        else:
            path = chance.choice(target.posts)
            filled = path.replace("{response_id}", "resp_0_" + "a" * 48)
            yield mutated(chance, filled, seeds_of(path))


async def test_the_seeds_are_valid(folder: Path) -> None:
    target = Target(folder / "seeds")
    for path, bodies in SEEDS.items():
        for body in bodies:
            got, _ = await target.send(Sent("POST", path, json.dumps(body).encode()))
            assert got.status == 200, (path, got.body)


@pytest.mark.timeout(600)
async def test_mutated_requests_are_answered_well(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = Target(folder / "bodies")
    chance = random.Random(SEED)
    kinds: dict[str, int] = {}
    for number, sent in enumerate(_requests(target, chance, BODIES)):
        try:
            _, kind = await target.send(sent)
        except Exception:
            print(f"seed {SEED}, request {number} of {BODIES}, made by {sent.made_by}")
            print(sent.method, sent.path, sent.query, sent.headers, sent.body[:3000])
            raise
        kinds[kind] = kinds.get(kind, 0) + 1
    print(f"seed {SEED}: {kinds}")
    assert kinds["error"] > BODIES / 4
    assert kinds["result"] + kinds["stream"] > BODIES / 20
    assert target.app.state.gateway.in_flight == 0


async def test_memory_does_not_grow(folder: Path) -> None:
    target = Target(folder / "memory")
    chance = random.Random(SEED + 1)
    requests = list(_requests(target, chance, max(100, BODIES // 20)))
    for sent in requests:  # caches fill, threads start
        await target.send(sent)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for sent in requests:
            await target.send(sent)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < MAX_GROWTH_BYTES, f"{(after - before) / len(requests):.0f} bytes stay of every request"
