"""``Idempotency-Key``: what derives from it, what it refuses, and that who comes back gets the same answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from mlx_cluster.engine.held import HeldEngine
from mlx_cluster.gateway.idempotency import Key, KeyBook
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script, ScriptedEngine
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"role": "user", "content": "hi"}
CHAT: tuple[str, dict[str, Any]] = ("/v1/chat/completions", {"model": "tiny", "messages": [HELLO]})
ROUTES: list[tuple[str, dict[str, Any]]] = [
    CHAT,
    ("/v1/completions", {"model": "tiny", "prompt": "hi"}),
    ("/v1/messages", {"model": "tiny", "messages": [HELLO], "max_tokens": 50}),
    ("/v1/responses", {"model": "tiny", "input": "hi"}),
    ("/api/chat", {"model": "tiny", "messages": [HELLO]}),
]
SAID = "hello world"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    """A second gateway."""
    async with running(tokenizer_dir, tokenizer) as made:
        yield made


def shared_engine(world: World, other: World, script: Script) -> tuple[ScriptedEngine, HeldEngine]:
    """One engine that holds, behind both gateways."""
    inner = ScriptedEngine(script)
    engine = HeldEngine(inner, 60, 1 << 20)
    world.routes.engines["tiny"] = other.routes.engines["tiny"] = engine  # type: ignore[assignment]
    return inner, engine


def says(world: World, text: str) -> list[int]:
    return [*world.tokenizer.encode(text), *world.tokenizer.eos_token_ids]


def keyed(key: str, **headers: str) -> dict[str, str]:
    return {"Idempotency-Key": key, **headers}


async def lines(answer: httpx.Response) -> list[str]:
    return [line async for line in answer.aiter_lines() if line.startswith(("data: {", "{"))]


def without_times(line: str) -> Any:
    """A line of a stream, without what tells when it was printed and by whom."""
    value = json.loads(line.removeprefix("data: "))

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            moments = ("created", "created_at", "completed_at")
            return {k: plain(v) for k, v in node.items() if k not in moments and not k.endswith("_duration")}
        return [plain(each) for each in node] if isinstance(node, list) else node

    return plain(value)


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_comes_back_at_another_gateway_gets_the_same_answer(
    world: World, other: World, path: str, body: dict[str, Any], stream: bool
) -> None:
    go = asyncio.Semaphore(3)
    inner, _ = shared_engine(world, other, Script(tokens=says(world, SAID), go=go))
    body, headers = {**body, "stream": stream}, keyed(f"{path} {stream}")

    async def leave_early() -> None:
        async with world.http.stream("POST", path, json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if line.startswith(("data: {", "{")) and "he" in line:
                    return

    first = asyncio.create_task(leave_early())
    await inner.until(lambda: inner.num_emitted >= 1 or bool(inner.requests))
    if stream:
        await asyncio.wait_for(first, 20)
    else:
        while inner.num_emitted < 2:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
    for _ in range(60):
        go.release()

    async def whole(where: World) -> list[Any]:
        async with where.http.stream("POST", path, json=body, headers=headers) as answer:
            assert answer.status_code == 200
            return [without_times(line) for line in await lines(answer)]

    again, once_more = await whole(other), await whole(other)
    assert again == once_more
    assert SAID.split()[0] in json.dumps(again)
    assert len(inner.requests) == 1
    assert inner.cancelled == []
    assert await whole(world) == again


async def test_seed_and_ids_follow_from_the_key_alone(world: World) -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    body = {**CHAT[1], "tools": [TOOL], "n": 2}

    async def ask(key: str, authorization: str = "Bearer a") -> tuple[Any, Any, Any]:
        engine = world.engine(text=call)
        headers = keyed(key, authorization=authorization)
        answer = (await world.http.post(CHAT[0], json=body, headers=headers)).json()
        calls = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
        assert engine.requests[0].key == engine.requests[1].key != ""
        return answer["id"], tuple(calls), engine.requests[0].sampling.seed

    one = await ask("one")
    assert one == await ask("one")
    id_, calls, seed = one
    assert len(set(calls)) == 2
    assert id_.startswith("chatcmpl-")
    assert 0 <= seed < 1 << 63
    for different in (await ask("two"), await ask("one", "Bearer b")):
        assert different[0] != id_
        assert not set(different[1]) & set(calls)
        assert different[2] != seed


async def test_a_given_seed_stays_and_without_a_key_nothing_is_held(world: World) -> None:
    engine = world.engine(text=SAID)
    await world.http.post(CHAT[0], json={**CHAT[1], "seed": 5}, headers=keyed("seeded"))
    await world.http.post(CHAT[0], json=CHAT[1])
    assert engine.requests[0].sampling.seed == 5
    assert engine.requests[1].key == ""


async def test_another_body_or_route_under_the_same_key_is_refused(world: World) -> None:
    world.engine(text=SAID)
    assert (await world.http.post(CHAT[0], json=CHAT[1], headers=keyed("mine"))).status_code == 200
    for path, body in ((CHAT[0], {**CHAT[1], "max_tokens": 3}), ROUTES[1]):
        answer = await world.http.post(path, json=body, headers=keyed("mine"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "idempotency_key_reused")
        mine = keyed("mine", authorization="Bearer somebody")
        assert (await world.http.post(path, json=body, headers=mine)).status_code == 200
        world.app.state.gateway.key_book = KeyBook()
        assert (await world.http.post(CHAT[0], json=CHAT[1], headers=keyed("mine"))).status_code == 200


async def test_the_engine_refuses_what_another_gateway_saw(world: World, other: World) -> None:
    shared_engine(world, other, Script(tokens=says(world, SAID)))
    assert (await world.http.post(CHAT[0], json=CHAT[1], headers=keyed("far"))).status_code == 200
    answer = await other.http.post(CHAT[0], json={**CHAT[1], "max_tokens": 3}, headers=keyed("far"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "idempotency_key_reused")


@pytest.mark.parametrize("key", [b"", b"x" * 256, b"tab\there", "ü".encode(), b"\x80"])
async def test_a_malformed_key_is_refused(world: World, key: bytes) -> None:
    engine = world.engine(text=SAID)
    headers = httpx.Headers([(b"idempotency-key", key)])
    answer = await world.http.post(CHAT[0], json=CHAT[1], headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_header")
    assert "1 to 255" in answer.json()["error"]["message"]
    assert engine.requests == []


async def test_two_keys_are_refused(world: World) -> None:
    headers = httpx.Headers([(b"idempotency-key", b"a"), (b"idempotency-key", b"b")])
    answer = await world.http.post(CHAT[0], json=CHAT[1], headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_header")


async def test_the_older_connection_is_told_that_a_newer_one_came(world: World, other: World) -> None:
    go = asyncio.Semaphore(2)
    inner, _ = shared_engine(world, other, Script(tokens=says(world, SAID), go=go))
    body, headers = {**CHAT[1], "stream": True}, keyed("twice")
    async with world.http.stream("POST", CHAT[0], json=body, headers=headers) as older:
        received = older.aiter_lines()
        await anext(received)
        newer = asyncio.create_task(other.http.post(CHAT[0], json=body, headers=headers))
        rest = [line async for line in received]
    error = json.loads(next(line for line in rest if "error" in line).removeprefix("data: "))["error"]
    assert error["code"] == "superseded"
    for _ in range(60):
        go.release()
    assert "hello" in (await newer).text
    assert len(inner.requests) == 1


async def test_a_background_response_is_begun_once(world: World) -> None:
    engine = world.engine(text=SAID)
    body = {"model": "tiny", "input": "hi", "background": True}
    first = (await world.http.post("/v1/responses", json=body, headers=keyed("back"))).json()
    await engine.until(lambda: bool(engine.finished))
    again = (await world.http.post("/v1/responses", json=body, headers=keyed("back"))).json()
    assert again["id"] == first["id"]
    assert len(engine.requests) == 1


async def test_the_book_is_bounded_and_forgets_the_least_recently_used() -> None:
    book = KeyBook(max_remembered=2)
    for name in ("a", "b", "a", "c"):
        book.note(Key(name, "body"))
    book.check(Key("b", "other"))
    with pytest.raises(Exception, match="another body"):
        book.check(Key("a", "other"))
