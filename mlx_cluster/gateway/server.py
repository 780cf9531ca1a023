"""An HTTP server inside the node's own event loop, for any ASGI application.

Owns: the listening socket, start and graceful stop.
Does not own: the application, signals (the node's), logging.
Invariant: after ``start`` the port is bound and answers; a port that cannot be had is a typed error, not an exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from mlx_cluster import log
from mlx_cluster.errors import ConfigError, PortInUse

_log = log.get("http")

# What uvicorn itself needs to wind down once the grace is over.
STOP_MARGIN_SECONDS = 5.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with a word when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.up.set()


class GatewayServer:
    """Serves one ASGI application on one address. Applications have no lifespan events here: the node owns lifetimes.

    ``port`` 0 takes a free one; ``port`` then tells which.
    """

    def __init__(self, app: Any, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._app = app
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and serve. Raises ``PortInUse`` or ``ConfigError`` (an address that is not this machine's)."""
        listener = await _bind(self.host, self.port)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            # Named, so that what frames each token does not depend on what else is installed.
            http="httptools",
            timeout_keep_alive=75,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name=f"http-{self.port}")
        up = asyncio.create_task(self._server.up.wait())
        try:
            await asyncio.wait({up, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self._task.done():
            self._task.result()
        _log.debug("serving", host=self.host, port=self.port)

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Stop listening, let running answers finish for ``grace_seconds``, then cancel them."""
        if self._server is None or self._task is None:
            return
        # uvicorn hands this to wait_for, which takes fractions; its annotation does not. At 0 it would complain of
        # connections that it has only just closed.
        self._server.config.timeout_graceful_shutdown = max(grace_seconds, 0.1)  # type: ignore[assignment]
        self._server.should_exit = True
        task, self._task = self._task, None
        _, late = await asyncio.wait({task}, timeout=grace_seconds + STOP_MARGIN_SECONDS)
        for straggler in late:
            straggler.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _bind(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(
            f"cannot resolve {host!r} to listen on it ({error.strerror}): use an address of this machine"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # A restarted node must not wait for the last connections of its predecessor to time out.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is taken by another program: stop it or choose another port"
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"may not listen on port {port}: choose one above 1023") from error
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}): use an address of this machine"
        ) from error
    return listener
