"""A bounded queue with one reader, who waits until a point in time.

Owns: waiting. Does not own: what is in it, which time that is.
Invariant: no timer is made for an item. The reader's time mostly moves on with every item it gets, so the one alarm of
a mailbox rings at an earlier time, looks whether it is still too early, and is set again.

``asyncio.Queue`` inside ``asyncio.timeout_at`` says the same and costs four times as much for each token.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """``close`` it at the end: an alarm keeps what waits for it alive."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()
        self._until = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    def empty(self) -> bool:
        return not self._items

    @property
    def is_full(self) -> bool:
        return len(self._items) >= self._most

    async def put(self, item: T) -> None:
        """Waits while the mailbox is full."""
        while self.is_full:
            room = asyncio.get_running_loop().create_future()
            self._writers.append(room)
            try:
                await room
            except asyncio.CancelledError:
                self._let_some_in()  # should this one's turn have come: it is another's now
                raise
        self._items.append(item)
        self._wake_reader()

    def take(self) -> list[T]:
        """All items that are there."""
        items = list(self._items)
        self._items.clear()
        if self._writers:
            self._let_some_in()
        return items

    async def take_until(self, when: float) -> list[T]:
        """All items, at least one; raises ``TimeoutError`` when there is none by ``when``, on the loop's clock."""
        while not self._items:
            loop = asyncio.get_running_loop()
            if loop.time() >= when:
                raise TimeoutError
            self._until = when
            if self._alarm is None or self._alarm.when() > when:
                self._set_alarm(loop)
            self._reader = loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self.take()

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _set_alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._alarm = loop.call_at(self._until, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._reader is None:
            return  # nobody waits; whoever does next sets it again
        loop = asyncio.get_running_loop()
        if loop.time() >= self._until:
            self._wake_reader()
        else:
            self._set_alarm(loop)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _let_some_in(self) -> None:
        """Wake as many writers as there is room for."""
        room = self._most - len(self._items)
        while self._writers and room > 0:
            writer = self._writers.popleft()
            if not writer.done():
                writer.set_result(None)
                room -= 1
