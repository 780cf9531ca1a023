"""The proxy itself: it must do what its modes say, or the network faults prove nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.cluster_processes import free_block
from tests.faults.tcp_proxy import TcpProxy

SHORT_SECONDS = 0.5


@pytest.fixture
def echo() -> Iterator[int]:
    """A port on 127.0.0.1 that answers what it hears, until the peer closes."""
    port = free_block(1)
    server = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield port
    server.close()


@pytest.fixture
def proxy(echo: int) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.1.2", "127.0.0.1", (echo,)) as made:
        yield made


@pytest.fixture
def client(proxy: TcpProxy, echo: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.1.2", echo), 10) as made:
        yield made


def exchange(client: socket.socket, data: bytes) -> bytes:
    client.settimeout(30)
    client.sendall(data)
    received = b""
    while len(received) < len(data):
        received += client.recv(65536)
    return received


def test_it_passes_what_it_gets(client: socket.socket) -> None:
    data = bytes(range(256)) * 2000
    assert exchange(client, data) == data


@pytest.mark.parametrize("mode", ["drop", "half"])
def test_what_is_dropped_does_not_arrive_until_it_passes_again(
    client: socket.socket, proxy: TcpProxy, mode: str
) -> None:
    assert exchange(client, b"one") == b"one"
    proxy.set(mode)  # type: ignore[arg-type]
    client.sendall(b"two")
    client.settimeout(SHORT_SECONDS)
    with pytest.raises(TimeoutError):
        client.recv(10)
    proxy.set("pass")
    client.settimeout(30)
    assert client.recv(10) == b"two"


def test_delay_keeps_the_order(client: socket.socket, proxy: TcpProxy) -> None:
    proxy.set("delay")
    assert exchange(client, b"abc") + exchange(client, b"def") == b"abcdef"


def test_reset_ends_old_and_new_connections(client: socket.socket, proxy: TcpProxy, echo: int) -> None:
    assert exchange(client, b"one") == b"one"
    proxy.set("reset")
    with pytest.raises(ConnectionResetError):
        client.recv(10)
    # The reset may come before the connection is used, or while it is made.
    with pytest.raises(ConnectionResetError), socket.create_connection(("127.0.1.2", echo), 10) as fresh:
        fresh.recv(10)
    proxy.set("pass")
    with socket.create_connection(("127.0.1.2", echo), 10) as again:
        assert exchange(again, b"back") == b"back"
