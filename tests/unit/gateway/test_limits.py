"""Who leaves, who waits too long, who is one too many. Each test has a gateway with its own limits."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mlx_cluster.errors import Recovering, StageLost, Unavailable
from mlx_cluster.gateway import session
from mlx_cluster.request import Engine
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script, served_model
from tests.unit.gateway.conftest import World, running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"
SOON = 0.15  # seconds; a limit that is meant to pass in a test


async def raw_request(
    world: World, body: dict[str, Any], read_buffer: int = 65_536
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has sent one request; closing it is how a client leaves."""
    host, port = world.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=read_buffer)
    content = json.dumps(body).encode()
    headers = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    head = f"POST {PATH} HTTP/1.1\r\n{headers}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("admitted", [False, True])
async def test_a_client_that_leaves_cancels_its_sequences(
    tokenizer_dir: Path, tokenizer: Tokenizer, stream: bool, admitted: bool
) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        admit = asyncio.Event()
        if admitted:
            admit.set()
        engine = world.engine(Script(tokens=tokenizer.encode("hello"), admit=admit, go=asyncio.Semaphore(0)))
        _, writer = await raw_request(world, {**CHAT, "stream": stream, "n": 2})
        await engine.until(lambda: len(engine.requests) == 2)
        await leave(writer)
        await engine.until(lambda: len(engine.cancelled) == 2)
        assert sorted(choice for _, choice in engine.cancelled) == [0, 1]
        async with asyncio.timeout(20):
            while world.metric("requests_total", route=PATH, status="499") == 0:
                await world.http.get("/livez")
        assert world.metric("in_flight") == 0


async def test_a_client_that_leaves_in_mid_stream_cancels_its_sequence(
    tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        engine = world.engine(Script(tokens=tokenizer.encode("hello w" * 50), go=asyncio.Semaphore(3)))
        reader, writer = await raw_request(world, {**CHAT, "stream": True})
        await reader.readuntil(b'"content": "hello"')
        await leave(writer)
        await engine.until(lambda: len(engine.cancelled) == 1)
        assert engine.num_emitted == 3


async def test_a_client_that_does_not_read_is_left(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, slow_reader_timeout=SOON) as world:
        world.routes.served = [served_model(tokenizer_dir, max_context=1_000_000)]
        endless = 400_000
        engine = world.engine(Script(tokens=tokenizer.encode("a") * endless))
        _, writer = await raw_request(world, {**CHAT, "stream": True, "max_tokens": endless}, read_buffer=4096)
        await engine.until(lambda: len(engine.cancelled) == 1)
        assert engine.num_emitted < endless  # what did not fit into buffers was never asked for
        await leave(writer)


async def test_a_slow_reader_gives_its_row_to_others_and_gets_the_rest_when_it_reads_on(
    tokenizer_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PREEMPT_SECONDS", SOON)
    async with running(tokenizer_dir, tokenizer) as world:
        world.routes.served = [served_model(tokenizer_dir, max_context=1_000_000)]
        count = 60_000
        engine = world.engine(Script(tokens=tokenizer.encode("a") * count))
        reader, writer = await raw_request(world, {**CHAT, "stream": True, "max_tokens": count}, read_buffer=4096)
        await engine.until(lambda: len(engine.cancelled) == 1)
        async with asyncio.timeout(60):
            letters, end = 0, b""
            while b"[DONE]" not in end:
                data = end + await reader.read(65_536)
                whole, _, end = data.rpartition(b"\n")
                letters += whole.count(b'"content": "a"') + whole.count(b'"content":"a"')
                end = whole[-16:] + b"\n" + end if b"[DONE]" in whole else end
        assert letters == count
        assert len(engine.requests) >= 2
        assert engine.requests[-1].emitted
        await leave(writer)


async def test_a_client_that_reads_on_too_late_finds_out_why(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, slow_reader_timeout=2.0) as world:
        world.routes.served = [served_model(tokenizer_dir, max_context=1_000_000)]
        endless = 400_000
        engine = world.engine(Script(tokens=tokenizer.encode("a") * endless))
        reader, writer = await raw_request(world, {**CHAT, "stream": True, "max_tokens": endless}, read_buffer=4096)
        await engine.until(lambda: len(engine.cancelled) == 1)
        async with asyncio.timeout(20):
            end = b""
            while b"[DONE]" not in end:
                end = end[-4096:] + await reader.read(65_536)
        assert b'"code": "slow_reader"' in end
        await leave(writer)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long_is_given_up(
    tokenizer_dir: Path, tokenizer: Tokenizer, stream: bool
) -> None:
    async with running(tokenizer_dir, tokenizer, total_timeout=SOON) as world:
        engine = world.engine(Script(tokens=tokenizer.encode("hello w"), go=asyncio.Semaphore(1)))
        answer = await world.http.post(PATH, json={**CHAT, "stream": stream})
        assert "api_gateway.total_timeout" in answer.text
        assert answer.status_code == (200 if stream else 504)
        assert answer.text.endswith("data: [DONE]\n\n") == stream
        assert len(engine.cancelled) == 1


async def test_headers_are_bounded(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        answer = await world.http.get("/v1/models", headers={"x-long": "x" * 65_536})
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


async def test_nobody_is_sent_away_for_longer_than_two_minutes(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        world.engine(Script(refuse=Unavailable("loading", retry_after_seconds=900.0)))
        answer = await world.http.post(PATH, json=CHAT)
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("120", "120000")


async def test_json_that_is_nested_too_deep_is_refused(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        body = b'{"model": "tiny", "messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
        answer = await world.http.post(PATH, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_one_request_too_many_is_refused_and_may_come_back(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, max_concurrent_requests=1) as world:
        go = asyncio.Semaphore(0)
        engine = world.engine(Script(tokens=tokenizer.encode("hello"), go=go))
        first = asyncio.create_task(world.http.post(PATH, json=CHAT))
        await engine.until(lambda: len(engine.requests) == 1)
        refused = await world.http.post(PATH, json=CHAT)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "max_concurrent_requests" in refused.json()["error"]["message"]
        assert (await world.http.get("/v1/models")).status_code == 200  # only generation is limited
        go.release()
        assert (await first).status_code == 200
        go.release()
        assert (await world.http.post(PATH, json=CHAT)).status_code == 200


async def test_a_place_is_free_as_soon_as_the_answer_is_there(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, max_concurrent_requests=1) as world:
        world.engine(text="hello STOP more")
        for stream in [False, True] * 10:
            answer = await world.http.post(PATH, json={**CHAT, "stream": stream, "stop": "STOP"})
            assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_no_admission_in_time_is_a_504(tokenizer_dir: Path, tokenizer: Tokenizer, stream: bool) -> None:
    async with running(tokenizer_dir, tokenizer, timeout=SOON) as world:
        engine = world.engine(Script(admit=asyncio.Event()))
        await warm(world)
        answer = await world.http.post(PATH, json={**CHAT, "stream": stream})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert "api_gateway.timeout" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert len(engine.cancelled) == len(engine.requests)  # on a busy machine it may not have come so far


async def test_no_first_token_in_time_is_an_error_in_the_stream(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, timeout=SOON) as world:
        world.engine(Script(tokens=(5,), go=asyncio.Semaphore(0)))
        await warm(world)
        answer = await world.http.post(PATH, json={**CHAT, "stream": True})
        assert answer.status_code == 200
        assert '"deadline_exceeded"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_stream_that_stalls_is_given_up(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, idle_timeout=SOON) as world:
        engine = world.engine(Script(tokens=tokenizer.encode("hello w"), go=asyncio.Semaphore(1)))
        answer = await world.http.post(PATH, json={**CHAT, "stream": True})
        assert "api_gateway.idle_timeout" in answer.text
        assert len(engine.cancelled) == 1


async def test_a_waiting_stream_shows_that_it_is_alive(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, keepalive_seconds=0.02) as world:
        go = asyncio.Semaphore(0)
        world.engine(Script(tokens=tokenizer.encode("hello"), go=go))
        reader, writer = await raw_request(world, {**CHAT, "stream": True})
        async with asyncio.timeout(20):
            await reader.readuntil(b": keep-alive\n\n")
            await reader.readuntil(b": keep-alive\n\n")
            go.release()
            await reader.readuntil(b"data: [DONE]\n\n")
        await leave(writer)


async def test_a_stream_shows_that_it_is_alive_while_an_engine_is_looked_for(
    tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    """Attempts come more often than keep-alives are due: they are no life sign to a client."""
    async with running(tokenizer_dir, tokenizer, keepalive_seconds=0.8, recovery_timeout=60) as world:
        engine = world.engine(Script(tokens=tokenizer.encode("hello"), fail_after=(1, StageLost("stage 1 died"))))

        def engine_for(_: str) -> Engine:
            if engine.requests:
                raise Recovering("comes up")
            return engine

        world.routes.engine_for = engine_for  # type: ignore[method-assign]
        reader, writer = await raw_request(world, {**CHAT, "stream": True})
        async with asyncio.timeout(30):
            await reader.readuntil(b": keep-alive\n\n")
            await reader.readuntil(b": keep-alive\n\n")
        await leave(writer)


async def test_a_body_that_does_not_arrive_is_a_408(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, timeout=SOON) as world:
        host, port = world.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode())
        writer.write(b"content-length: 100\r\n\r\n{")
        async with asyncio.timeout(20):
            answer = await reader.readuntil(b"request_timeout")
        assert answer.startswith(b"HTTP/1.1 408")
        await leave(writer)


async def warm(world: World) -> None:
    """Load the tokenizer, so that a short limit is about the engine."""
    await world.app.state.gateway.catalogue.warm()
