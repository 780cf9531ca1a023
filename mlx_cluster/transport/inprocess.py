"""The link inside one event loop: two stages of one process, and tests.

Owns: nothing but a bounded mailbox between two ends.
Invariant: at most ``capacity`` frames are under way; a payload is handed over, never copied.
"""

from __future__ import annotations

import asyncio

from mlx_cluster.errors import LinkClosed, LinkTimeout
from mlx_cluster.microbatch import Frame
from mlx_cluster.transport.mailbox import Mailbox


class InprocessSendEnd:
    """See ``link.SendEnd``. A send that timed out has handed over nothing and may be repeated."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._order = asyncio.Lock()

    async def send(self, frame: Frame, timeout_seconds: float) -> None:
        try:
            async with asyncio.timeout(timeout_seconds), self._order:
                await self._mailbox.put(frame)
        except TimeoutError:
            raise LinkTimeout(
                f"the next stage did not take microbatch {frame.microbatch_id} within {timeout_seconds:g} s"
            ) from None

    async def close(self) -> None:
        self._mailbox.close(LinkClosed("the sending stage closed the link"))


class InprocessReceiveEnd:
    """See ``link.ReceiveEnd``. A receive that timed out may be repeated."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    async def receive(self, timeout_seconds: float) -> Frame:
        try:
            return await self._mailbox.get(timeout_seconds)
        except TimeoutError:
            raise LinkTimeout(f"the previous stage sent nothing within {timeout_seconds:g} s") from None

    async def close(self) -> None:
        self._mailbox.close(LinkClosed("the receiving stage closed the link"), discard=True)


def pair(capacity: int) -> tuple[InprocessSendEnd, InprocessReceiveEnd]:
    """Both ends of one hop. They belong to the running event loop."""
    mailbox = Mailbox(capacity)
    return InprocessSendEnd(mailbox), InprocessReceiveEnd(mailbox)
