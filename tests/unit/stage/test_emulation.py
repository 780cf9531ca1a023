"""The emulated device: time passes as on one device, in order, while Python does other things."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mlx_cluster.microbatch import Kind, Load, Microbatch, RowSpec, Store, TensorSpec
from mlx_cluster.request import Sampling
from mlx_cluster.stage.emulation import EmulatedRunner, scripted_token, step_seconds
from mlx_cluster.stage.spec import EmulationSpec

SPEC = EmulationSpec(seconds_per_row=0.5, seconds_per_step=2.0, seconds_per_prompt_token=0.25)
PREFILL = Microbatch(
    0, Kind.PREFILL, rows=(1,), tokens=tuple(range(8)), admit=(RowSpec(1, Sampling(seed=3), choice=0),)
)
DECODE = Microbatch(1, Kind.DECODE, rows=(1, 2), tokens=(5, 6))
CONTROL = Microbatch(2, Kind.CONTROL, release=(1,))


class VirtualTime:
    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def runner(spec: EmulationSpec = SPEC, *, last: bool = False) -> tuple[EmulatedRunner, VirtualTime]:
    time = VirtualTime()
    return EmulatedRunner(spec, last=last, clock=time.clock, sleep=time.sleep), time


SEVERAL = Microbatch(4, Kind.PREFILL, rows=(1, 2, 3), tokens=tuple(range(8)), lengths=(1, 5, 2))


VERIFY = Microbatch(5, Kind.VERIFY, rows=(1,), tokens=(9, 1, 2, 3))


@pytest.mark.parametrize(
    ("header", "seconds"), [(PREFILL, 4.0), (SEVERAL, 4.0), (DECODE, 3.0), (VERIFY, 4.0), (CONTROL, 0.0)]
)
def test_the_cost_of_a_microbatch(header: Microbatch, seconds: float) -> None:
    assert step_seconds(SPEC, header) == seconds


def test_dispatch_returns_at_once_and_the_device_does_one_thing_after_the_other() -> None:
    emulated, time = runner()
    first, second = emulated.submit(PREFILL, None), emulated.submit(DECODE, None)
    assert time.now == 100.0
    first.wait()
    assert time.now == 104.0
    second.wait()
    assert time.now == 107.0
    time.now = 200.0  # the device was idle
    third = emulated.submit(replace(DECODE, id=3), None)
    third.wait()
    assert time.now == 203.0


def test_frames_have_the_size_of_real_ones() -> None:
    emulated, _ = runner()
    prefill = emulated.submit(PREFILL, None).wait().frame
    step = emulated.submit(DECODE, None).wait().frame
    assert prefill is not None
    assert step is not None
    assert (prefill.microbatch_id, prefill.tensors) == (0, (TensorSpec("bfloat16", (1, 8, 3584)),))
    assert (step.microbatch_id, step.tensors) == (1, (TensorSpec("bfloat16", (2, 1, 3584)),))
    assert (memoryview(prefill.payload).nbytes, memoryview(step.payload).nbytes) == (8 * 7168, 2 * 7168)
    assert emulated.submit(CONTROL, None).wait().frame is None


def test_several_prompts_draw_one_token_each_and_entries_are_never_missing() -> None:
    emulated, _ = runner(last=True)
    admit = tuple(RowSpec(row, Sampling(seed=row), choice=0) for row in (1, 2, 3))
    header = replace(SEVERAL, sample=True, admit=admit, store=(Store(9, 4),), load=(Load(2, 4, 10),), evict=(1,))
    outcome = emulated.submit(header, None).wait()
    assert [drawn.row for drawn in outcome.sampled] == [1, 2, 3]
    assert outcome.missing == ()
    front, _ = runner()
    frame = front.submit(header, None).wait().frame
    assert frame is not None
    assert frame.tensors == (TensorSpec("bfloat16", (3, 5, 3584)),)


def test_tokens_are_keyed_so_that_a_resumed_row_continues() -> None:
    emulated, _ = runner(last=True)
    assert emulated.submit(PREFILL, None).wait().sampled == ()
    tokens = []
    for i in range(5):
        (drawn,) = emulated.submit(Microbatch(i, Kind.DECODE, rows=(1,), tokens=(0,), sample=True), None).wait().sampled
        tokens.append(drawn.token_id)
    assert tokens == [scripted_token(SPEC, 3, 0, i) for i in range(5)]
    assert len(set(tokens)) == 5
    resumed = RowSpec(9, Sampling(seed=3), choice=0, first_index=3)
    header = Microbatch(6, Kind.PREFILL, rows=(9,), tokens=(0,), sample=True, admit=(resumed,), release=(1,))
    assert emulated.submit(header, None).wait().sampled[0].token_id == tokens[3]


def test_burnt_python_time_is_part_of_the_step() -> None:
    ticks = iter(range(10_000))
    spec = EmulationSpec(seconds_per_step=100.0, burn_python_seconds=10.0)
    slept: list[float] = []
    emulated = EmulatedRunner(spec, last=False, clock=lambda: float(next(ticks)), sleep=slept.append)
    pending = emulated.submit(DECODE, None)
    assert next(ticks) > 10
    pending.wait()
    assert 80 <= slept[0] <= 90


def test_a_draft_is_accepted_up_to_the_first_token_that_differs() -> None:
    emulated, _ = runner(replace(SPEC, repeat_after=3), last=True)
    admit = (RowSpec(1, Sampling(seed=3), choice=0),)
    first = emulated.submit(Microbatch(0, Kind.PREFILL, (1,), (5,), sample=True, admit=admit), None).wait()
    said = [first.sampled[0].token_id]
    expected = [scripted_token(replace(SPEC, repeat_after=3), 3, 0, index) for index in range(9)]
    assert expected[:3] == expected[3:6] == expected[6:]
    for right, wrong in ((2, 0), (0, 2), (1, 3)):
        draft = [*expected[len(said) : len(said) + right], *[0] * wrong]
        header = Microbatch(1, Kind.VERIFY, (1,), (said[-1], *draft), sample=True)
        sampled = emulated.submit(header, None).wait().sampled
        assert len(sampled) == right + 1
        said += [one.token_id for one in sampled]
    assert said == expected[: len(said)]
    assert len(said) == 7


def test_steps_may_rise_in_stairs_and_chunks_slow_down_along_a_prompt() -> None:
    spec = EmulationSpec(seconds_per_step=1.0, rows_per_step=4, seconds_per_prompt_square=0.5)
    steps = [Microbatch(0, Kind.DECODE, rows=tuple(range(n)), tokens=(0,) * n) for n in (1, 4, 5, 8, 9)]
    assert [step_seconds(spec, step) for step in steps] == [1.0, 1.0, 2.0, 2.0, 3.0]
    emulated, clock = runner(spec)
    begun = []
    for chunk in range(3):
        begun.append(clock.clock())
        header = Microbatch(
            chunk, Kind.PREFILL, rows=(1,), tokens=(0, 0), admit=(RowSpec(1, Sampling(), 0),) if not chunk else ()
        )
        emulated.submit(header, None).wait()
    begun.append(clock.clock())
    assert [b - a for a, b in itertools.pairwise(begun)] == [3.0, 7.0, 11.0]
