"""A TCP proxy that does to a connection what a network may do: lose it, hold it up, cut one direction, reset it.

Owns: listeners of one node's advertised address, each forwarding to the same port where the node really listens. One
thread with its own event loop; every method may be called from any thread.
Invariant: in mode ``pass`` bytes arrive unchanged and in order; a mode holds for old connections and new ones alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, Literal

Mode = Literal["pass", "drop", "delay", "half", "reset"]
BLOCK_BYTES = 64 * 1024
CALL_SECONDS = 10.0


class TcpProxy:
    """Listens on ``host`` for each port and forwards to ``target_host``; a context manager.

    ``drop``: connections stay open and nothing travels any more. ``delay``: each block waits ``delay_seconds``.
    ``half``: what clients send arrives, what the node answers does not. ``reset``: connections are reset, new ones too.
    """

    def __init__(self, host: str, target_host: str, ports: Iterable[int], delay_seconds: float = 0.2) -> None:
        self._host, self._target_host, self._ports = host, target_host, tuple(ports)
        self._delay_seconds = delay_seconds
        self._modes: dict[int, Mode] = dict.fromkeys(self._ports, "pass")
        self._open: dict[int, set[asyncio.StreamWriter]] = {port: set() for port in self._ports}
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {host}", daemon=True)
        self.num_connections = 0

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_SECONDS)
        self._loop.close()

    def set(self, mode: Mode, *ports: int) -> None:
        """From now on do this to these ports (default: all)."""
        self._call(self._set(mode, ports or self._ports))

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.result(CALL_SECONDS)

    # -- in the proxy's loop ----------------------------------------------------------------------------------

    async def _listen(self) -> None:
        for port in self._ports:
            server = await asyncio.start_server(
                lambda reader, writer, port=port: self._accept(port, reader, writer),  # type: ignore[misc]
                self._host,
                port,
            )
            self._servers.append(server)

    async def _set(self, mode: Mode, ports: Iterable[int]) -> None:
        for port in ports:
            self._modes[port] = mode
            if mode == "reset":
                for writer in list(self._open[port]):
                    _reset(writer)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _accept(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        if self._modes[port] == "reset":
            _reset(writer)
            return
        try:
            there_reader, there_writer = await asyncio.open_connection(self._target_host, port)
        except OSError:
            _reset(writer)  # as the kernel of a host without a listener does
            return
        writers = {writer, there_writer}
        self._open[port] |= writers
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(port, reader, there_writer, towards_client=False))
                group.create_task(self._carry(port, there_reader, writer, towards_client=True))
        except* OSError:
            pass
        finally:
            self._open[port] -= writers
            for each in writers:
                each.close()

    async def _carry(
        self, port: int, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, towards_client: bool
    ) -> None:
        while data := await source.read(BLOCK_BYTES):
            if self._modes[port] == "delay":
                await asyncio.sleep(self._delay_seconds)
            await self._until_passing(port, towards_client)
            target.write(data)
            await target.drain()
        await self._until_passing(port, towards_client)
        with contextlib.suppress(OSError):
            target.write_eof()

    async def _until_passing(self, port: int, towards_client: bool) -> None:
        """Hold what a dropped direction carries: TCP would send it again for as long."""
        while self._modes[port] == "drop" or (self._modes[port] == "half" and towards_client):
            await self._changed.wait()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for writers in self._open.values():
            for writer in list(writers):
                _reset(writer)
        await self._set("reset", self._ports)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
