"""Where a stage compresses what it sends, and expands what it receives.

Owns: a runner around the runner. Sending is the waiter thread's work, behind the computation: the event loop never
waits for it, and the stage's report counts the bytes that really travel. Receiving is the mlx thread's.
Does not own: the codec (``transport.compression``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_cluster.microbatch import Frame, Microbatch, Outcome, Pending, Runner
from mlx_cluster.transport import compression


@dataclass(frozen=True, slots=True)
class _Compressed:
    pending: Pending

    def wait(self) -> Outcome:
        outcome = self.pending.wait()
        return outcome if outcome.frame is None else replace(outcome, frame=compression.compress(outcome.frame))


class CompressingRunner:
    """See ``microbatch.Runner``. Expands whatever comes compressed; compresses when ``sends`` says so."""

    def __init__(self, runner: Runner, *, sends: bool) -> None:
        self._runner, self._sends = runner, sends

    def submit(self, header: Microbatch, frame: Frame | None) -> Pending:
        pending = self._runner.submit(header, None if frame is None else compression.expand(frame))
        return _Compressed(pending) if self._sends else pending
