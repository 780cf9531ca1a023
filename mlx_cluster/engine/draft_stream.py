"""The engine's stream to the process of a small model that drafts.

Owns: the stream, and the ``DraftModel`` behind it as long as the process answers.
Does not own: the process (``node.draft``). Invariant: whatever happens here, serving goes on; it only gets slower.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_cluster import log
from mlx_cluster._pb import stage_pb2
from mlx_cluster.engine.draft_model import DraftModel
from mlx_cluster.engine.stages import StageStream
from mlx_cluster.microbatch import Microbatch, Report
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.wire import encode_microbatch

_log = log.get("engine.drafts")
# A row has one header under way, so they never pile up.
_CAPACITY = 64


class DraftStream:
    """``on_draft`` is called when there may be more of a draft; ``on_lost`` once, with the reason."""

    def __init__(
        self,
        address: str,
        plan: Plan,
        epoch: Epoch,
        *,
        max_ahead: int,
        on_draft: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.model = DraftModel(self._send, max_ahead=max_ahead)
        self._on_draft, self._on_lost = on_draft, on_lost
        self._stream = StageStream(
            0, address, plan, str(epoch), capacity=_CAPACITY, on_report=self._on_report, on_lost=self._lost
        )
        self._over = False

    async def open(self, timeout_seconds: float) -> None:
        """Raises ``StageStartError`` when the process does not answer."""
        await self._stream.open(timeout_seconds)

    async def close(self) -> None:
        self._over = True
        await self._stream.close()

    def tick(self, now: float, silence_seconds: float) -> None:
        """Now and then: a process that is frozen shows by its silence."""
        if self._stream.opened and not self._over:
            if self._stream.silent_seconds(now) > silence_seconds:
                self._lost(0, f"silent for {self._stream.silent_seconds(now):.1f} s")
            else:
                self._stream.tick()

    def _send(self, microbatch: Microbatch) -> None:
        if not self._over:
            self._stream.put(stage_pb2.EngineMessage(microbatch=encode_microbatch(microbatch)).SerializeToString())

    def _on_report(self, report: Report) -> None:
        if not self._over:
            self.model.on_report(report)
            self._on_draft()

    def _lost(self, _stage: int, reason: str) -> None:
        if not self._over:
            self._over = True
            _log.warning("the draft model is gone; drafts are looked up in the text alone", reason=reason)
            self._on_lost(reason)
