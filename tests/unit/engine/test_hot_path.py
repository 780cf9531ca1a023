"""What a token costs on the way to the stages: headers of a few bytes, whatever the prompts' lengths were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster._pb import stage_pb2
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Policy
from mlx_cluster.microbatch import Kind, Microbatch
from mlx_cluster.request import Sampling, SequenceRequest
from mlx_cluster.wire import encode_microbatch
from tests.simulated_pipeline import SimulatedPipeline

FIXED_BYTES, ROW_BYTES = 64, 16
HIGH = 2**32 - 1


def num_bytes(microbatch: Microbatch) -> int:
    """As the engine sends it."""
    return len(stage_pb2.EngineMessage(microbatch=encode_microbatch(microbatch)).SerializeToString())


@given(st.lists(st.tuples(st.integers(0, HIGH), st.integers(0, HIGH)), min_size=1, max_size=300), st.integers(0, 2**60))
def test_a_decode_header_is_a_few_bytes_for_each_row(rows: list[tuple[int, int]], number: int) -> None:
    header = Microbatch(
        number,
        Kind.DECODE,
        rows=tuple(row for row, _ in rows),
        tokens=tuple(token for _, token in rows),
        group=HIGH,
        sample=True,
    )
    assert num_bytes(header) <= FIXED_BYTES + ROW_BYTES * len(rows)


def test_what_the_scheduler_sends_in_steady_state_does_not_know_how_long_prompts_were() -> None:
    """A third of the rows have penalties, whose histories the last stage got with their first chunks."""
    policy = Policy(num_stages=3, max_rows=64, max_queue=10, prefill_chunk=256, num_groups=lambda _rows: 3)
    pipeline = SimulatedPipeline(Scheduler(policy), [lambda _: 1.0] * 3)
    for index in range(24):
        sampling = Sampling(presence_penalty=0.5 if index % 3 == 0 else 0.0)
        prompt = tuple(range(150_000, 150_000 + 40 * (index + 1)))
        pipeline.submit(SequenceRequest(f"request-{index}", "m", prompt, 60, sampling))
    pipeline.run()
    steps = [m for _, m in pipeline.sent if m.kind is Kind.DECODE and not (m.release or m.admit or m.store)]
    assert len(steps) > 100
    assert max(len(step.rows) for step in steps) >= 8
    for step in steps:
        assert num_bytes(step) <= FIXED_BYTES + ROW_BYTES * len(step.rows)
