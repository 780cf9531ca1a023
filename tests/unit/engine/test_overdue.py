from __future__ import annotations

import pytest

from mlx_cluster.engine.chunking import ChunkTimes
from mlx_cluster.engine.curves import ENOUGH_CHUNKS, ENOUGH_STEPS
from mlx_cluster.engine.fill import Fill
from mlx_cluster.engine.overdue import PATIENCE, deadline_seconds
from mlx_cluster.microbatch import Kind, Microbatch

FLOOR = 5.0


def measured(step_seconds: float, seconds_per_token: float) -> tuple[ChunkTimes, Fill]:
    times, fill = ChunkTimes(2), Fill(2)
    for stage in range(2):
        for _ in range(ENOUGH_STEPS):
            fill.observe(stage, 4, step_seconds)
        for length in range(32, 32 * (ENOUGH_CHUNKS + 2), 32):
            times.observe(stage, [(0, length)], length * seconds_per_token)
    return times, fill


PREFILL = Microbatch(1, Kind.PREFILL, rows=(1,), tokens=(0,) * 64)
DECODE = Microbatch(2, Kind.DECODE, rows=(1, 2, 3, 4), tokens=(0,) * 4)


@pytest.mark.parametrize("header", [PREFILL, DECODE, Microbatch(3, Kind.CONTROL)])
def test_quick_steps_and_unmeasured_ones_have_the_floor(header: Microbatch) -> None:
    chunks = [(0, 64)] if header is PREFILL else []
    assert deadline_seconds(FLOOR, header, chunks, *measured(0.01, 0.001)) == FLOOR
    assert deadline_seconds(FLOOR, header, chunks, ChunkTimes(2), Fill(2)) == FLOOR


def test_what_takes_long_gets_many_times_its_prediction() -> None:
    times, fill = measured(2.0, 0.1)
    assert deadline_seconds(FLOOR, DECODE, [], times, fill) == pytest.approx(2.0 * PATIENCE)
    assert deadline_seconds(FLOOR, PREFILL, [(0, 64)], times, fill) == pytest.approx(6.4 * PATIENCE, rel=0.01)
    assert deadline_seconds(FLOOR, PREFILL, [(0, 64), (0, 64)], times, fill) == pytest.approx(12.8 * PATIENCE, rel=0.01)
