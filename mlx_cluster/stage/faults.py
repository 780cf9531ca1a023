"""Faults that a test orders of one stage, to see that the others and the engine cope.

Owns: carrying out a ``FaultSpec``, around any runner. Does not own: the runner; no configuration can ask for a fault.
Invariant: what the runner is told contradicts nothing that it was promised: a forgotten entry is one that was evicted.
"""

from __future__ import annotations

from dataclasses import replace

from mlx_cluster.microbatch import Frame, Microbatch, Pending, Runner
from mlx_cluster.stage.spec import FaultSpec


class FaultyRunner:
    """See ``microbatch.Runner``."""

    def __init__(self, runner: Runner, faults: FaultSpec) -> None:
        self._runner, self._faults = runner, faults
        self._num_stored = 0

    def submit(self, header: Microbatch, frame: Frame | None) -> Pending:
        return self._runner.submit(self._forgetful(header), frame)

    def _forgetful(self, header: Microbatch) -> Microbatch:
        """A stage evicts behind the stores of a header, so what is named here is gone at once."""
        gone: list[int] = []
        for store in header.store:
            if self._num_stored in self._faults.forget_stores:
                gone.append(store.entry)
            self._num_stored += 1
        return replace(header, evict=(*header.evict, *gone)) if gone else header
