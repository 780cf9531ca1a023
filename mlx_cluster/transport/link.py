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

    def __str__(self) -> str:
        return f"hop {self.sender}→{self.sender + 1} of {self.pipeline} in epoch {self.epoch}"


@dataclass(frozen=True, slots=True)
class StagePosition:
    """Where a stage stands in its pipeline, and under which epoch and plan: names both of its hops."""

    pipeline: str
    epoch: Epoch
    plan_hash: str
    index: int
    num_stages: int

    @property
    def hop_in(self) -> HopId | None:
        """The hop from the previous stage; None on stage 0."""
        return self._hop(self.index - 1) if self.index > 0 else None

    @property
    def hop_out(self) -> HopId | None:
        """The hop to the next stage; None on the last one."""
        return self._hop(self.index) if self.index + 1 < self.num_stages else None

    def _hop(self, sender: int) -> HopId:
        return HopId(self.pipeline, self.epoch, self.plan_hash, sender)


class SendEnd(Protocol):
    """Held by stage *s*."""

    async def send(self, frame: Frame, timeout_seconds: float) -> None:
        """Hand over one frame. Raises ``LinkClosed``, ``LinkTimeout``, ``LinkMismatch``.

        Frames of concurrent sends arrive in the order of the calls. After ``LinkTimeout`` the end may be unusable.
        """
        ...

    async def close(self) -> None:
        """Let go; the peer's next ``receive`` raises ``LinkClosed``. Idempotent."""
        ...


class ReceiveEnd(Protocol):
    """Held by stage *s + 1*."""

    async def receive(self, timeout_seconds: float) -> Frame:
        """The next frame; one call at a time. Raises ``LinkClosed``, ``LinkTimeout``, ``LinkMismatch``."""
        ...

    async def close(self) -> None:
        """Let go; the peer's sends raise ``LinkClosed``. Idempotent."""
        ...
