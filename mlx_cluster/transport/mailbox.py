"""A bounded queue of frames that can be closed: what stands behind a receive end inside one event loop.

Owns: the bound, the order, and that frames which arrived before a close are handed out before the close is told.
Does not own: deadlines in words (the ends turn ``TimeoutError`` into ``LinkTimeout`` and name the peer).
Invariant: never more than ``capacity`` frames.
"""

from __future__ import annotations

import asyncio
from collections import deque

from mlx_cluster.errors import LinkError
from mlx_cluster.microbatch import Frame


class Mailbox:
    """One producer, one consumer, one event loop. The first ``close`` wins; its error is what everybody hears."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a link needs room for at least one frame, not {capacity}")
        self._capacity = capacity
        self._frames: deque[Frame] = deque()
        self._error: LinkError | None = None
        self._consumer: asyncio.Future[None] | None = None
        self._producer: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def put(self, frame: Frame) -> None:
        """Append, waiting for room. Raises the error of ``close``."""
        while len(self._frames) >= self._capacity and self._error is None:
            self._producer = asyncio.get_running_loop().create_future()
            await self._producer
        self._raise_if_closed()
        self._frames.append(frame)
        _wake(self._consumer)

    async def get(self, timeout_seconds: float) -> Frame:
        """The oldest frame, waiting for one. Raises ``TimeoutError``, or ``close``'s error once nothing is left."""
        if not self._frames:
            await self._filled(timeout_seconds)
        _wake(self._producer)
        return self._frames.popleft()

    def close(self, error: LinkError, *, discard: bool = False) -> None:
        """Refuse new frames; ``discard`` also drops those that nobody has taken yet."""
        if self._error is None:
            self._error = error
        if discard:
            self._frames.clear()
        _wake(self._consumer)
        _wake(self._producer)

    async def _filled(self, timeout_seconds: float) -> None:
        # A bare timer of the loop costs a third of asyncio.timeout, and this stands in every hop of a token.
        loop = asyncio.get_running_loop()
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            _wake(self._consumer)

        timer = loop.call_later(timeout_seconds, expire)
        try:
            while not self._frames:
                self._raise_if_closed()
                if expired:
                    raise TimeoutError
                self._consumer = loop.create_future()
                await self._consumer
        finally:
            timer.cancel()

    def _raise_if_closed(self) -> None:
        if self._error is not None:
            raise type(self._error)(str(self._error))


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
