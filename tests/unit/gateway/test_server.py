"""The HTTP server inside a node's loop: ports, signals, stopping."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import httpx
import pytest

from mlx_cluster.errors import ConfigError, PortInUse
from mlx_cluster.gateway.server import GatewayServer


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """A small ASGI application; /slow never ends by itself."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/slow":
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await asyncio.Event().wait()
    await send({"type": "http.response.body", "body": b"hello"})


async def test_any_application_is_served_and_stopped() -> None:
    server = GatewayServer(hello, "127.0.0.1", 0)
    await server.start()
    assert server.port != 0
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{server.port}/")).text == "hello"
        await server.stop(5)
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{server.port}/")
    await server.stop(5)  # a second time does nothing


async def test_a_taken_port_is_named_with_the_remedy() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} on 127\.0\.0\.1 is taken .* choose another port"):
            await GatewayServer(hello, "127.0.0.1", port).start()


async def test_a_port_is_free_again_after_stop() -> None:
    first = GatewayServer(hello, "127.0.0.1", 0)
    await first.start()
    await first.stop(1)
    second = GatewayServer(hello, "127.0.0.1", first.port)
    await second.start()
    await second.stop(1)


async def test_an_address_of_another_machine_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        await GatewayServer(hello, "192.0.2.1", 0).start()


async def test_signal_handlers_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    server = GatewayServer(hello, "127.0.0.1", 0)
    await server.start()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    await server.stop(0)


async def test_an_answer_that_does_not_end_is_cancelled_after_the_grace() -> None:
    server = GatewayServer(hello, "127.0.0.1", 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(20):
        await reader.readuntil(b"begun")
        await server.stop(0.1)
        await reader.read()
    writer.close()
    await writer.wait_closed()
