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
        self._filled = asyncio.Event()
        self._room = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def put(self, frame: Frame) -> None:
        """Append, waiting for room. Raises the error of ``close``."""
        while len(self._frames) >= self._capacity and self._error is None:
            self._room.clear()
            await self._room.wait()
        self._raise_if_closed()
        self._frames.append(frame)
        self._filled.set()

    async def get(self) -> Frame:
        """The oldest frame, waiting for one. Raises the error of ``close`` once nothing is left."""
        while not self._frames:
            self._raise_if_closed()
            self._filled.clear()
            await self._filled.wait()
        self._room.set()
        return self._frames.popleft()

    def close(self, error: LinkError, *, discard: bool = False) -> None:
        """Refuse new frames; ``discard`` also drops those that nobody has taken yet."""
        if self._error is None:
            self._error = error
        if discard:
            self._frames.clear()
        self._filled.set()
        self._room.set()

    def _raise_if_closed(self) -> None:
        if self._error is not None:
            raise type(self._error)(str(self._error))
