"""The seam between two neighbouring stages.

Owns: the two protocols of a link's ends. A link is one direction of one hop.
Does not own: ``microbatch.Frame``, which crosses it, or what its bytes mean (``model.state`` packs hidden states).
Invariant: frames arrive whole, once, in the order they were sent; every call has a deadline; every failure is a
``LinkError``. ``tests/contract/test_links.py`` runs over all implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mlx_cluster.microbatch import Frame
from mlx_cluster.plan import Epoch


@dataclass(frozen=True, slots=True)
class HopId:
    """What both ends must agree on before the first frame."""

    pipeline: str
    epoch: Epoch
    plan_hash: str
    sender: int  # stage index; the receiver is sender + 1


class SendEnd(Protocol):
    """Held by stage *s*."""

    async def send(self, frame: Frame, timeout_seconds: float) -> None:
        """Hand over one frame. Raises ``LinkClosed``, ``LinkTimeout``, ``LinkMismatch``."""
        ...

    async def close(self) -> None:
        """Let go; the peer's next ``receive`` raises ``LinkClosed``. Idempotent."""
        ...


class ReceiveEnd(Protocol):
    """Held by stage *s + 1*."""

    async def receive(self, timeout_seconds: float) -> Frame:
        """The next frame. Raises ``LinkClosed``, ``LinkTimeout``, ``LinkMismatch``."""
        ...

    async def close(self) -> None:
        """Let go; the peer's sends raise ``LinkClosed``. Idempotent."""
        ...
