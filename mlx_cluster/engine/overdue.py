"""When a microbatch counts as overdue, which ends the epoch. Pure.

Owns: what a microbatch is predicted to take, and the deadline made of it.
Does not own: the clock, ticks (a frozen process is found by them, and sooner), what follows.
Invariant: never sooner than the floor, which is configured: what was measured says nothing of a kernel that is compiled
at its first use, or of a machine that has just got other work. So predictions only ever lengthen the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_cluster.engine.chunking import ChunkTimes
from mlx_cluster.engine.fill import Fill
from mlx_cluster.microbatch import Kind, Microbatch

# A stage may take so many times what was predicted for its part.
PATIENCE = 10.0


def deadline_seconds(
    floor_seconds: float, microbatch: Microbatch, chunks: Sequence[tuple[int, int]], times: ChunkTimes, fill: Fill
) -> float:
    """How long no stage may report anything while this microbatch, the oldest, is on its way.

    ``chunks`` are the (position, length) of a prefill.
    """
    predicted: float | None
    if microbatch.kind is Kind.PREFILL:
        predicted = sum(times.seconds(position, length) for position, length in chunks) if times.is_measured else None
    elif microbatch.kind is Kind.CONTROL:
        predicted = None
    else:  # to the layers a verified position is a row
        predicted = fill.step_seconds(len(microbatch.tokens))
    return floor_seconds if predicted is None else max(floor_seconds, PATIENCE * predicted)
