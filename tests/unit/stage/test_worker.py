"""The loop of a stage over in-process links, with a runner whose device is a gate that the test opens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from mlx_cluster.errors import LinkClosed, LinkMismatch, LinkTimeout, StageLost
from mlx_cluster.microbatch import Frame, Kind, Microbatch, Outcome, Report, Sampled, TensorSpec
from mlx_cluster.stage.device import DeviceThread
from mlx_cluster.stage.worker import DEVICE_DEPTH, MAX_IN_HAND, Worker
from mlx_cluster.transport import inprocess
from mlx_cluster.transport.link import ReceiveEnd, SendEnd

PATIENCE_SECONDS = 30.0


def decode(microbatch_id: int, *rows: int) -> Microbatch:
    return Microbatch(microbatch_id, Kind.DECODE, rows=rows or (7,), tokens=rows or (7,), sample=True)


def frame(microbatch_id: int, payload: bytes = b"ab") -> Frame:
    return Frame(microbatch_id, (TensorSpec("uint8", (len(payload),)),), payload)


@dataclass
class FakePending:
    outcome: Outcome
    gate: threading.Event
    error: Exception | None = None

    def wait(self) -> Outcome:
        assert self.gate.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        return self.outcome


@dataclass
class FakeRunner:
    """Appends a byte to the hidden state; on the last stage draws the microbatch's id for each row."""

    last: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    submitted: list[tuple[Microbatch, Frame | None]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    errors: dict[int, Exception] = field(default_factory=dict)
    wait_errors: dict[int, Exception] = field(default_factory=dict)
    seen: Callable[[], None] = lambda: None

    def submit(self, header: Microbatch, frame: Frame | None) -> FakePending:
        self.submitted.append((header, frame))
        self.threads.add(threading.get_ident())
        self.seen()
        if header.id in self.errors:
            raise self.errors[header.id]
        return FakePending(self._outcome(header, frame), self.gate, self.wait_errors.get(header.id))

    def _outcome(self, header: Microbatch, received: Frame | None) -> Outcome:
        if header.kind is Kind.CONTROL:
            return Outcome()
        if self.last:
            return Outcome(sampled=tuple(Sampled(row, header.id) for row in header.rows))
        payload = bytes(received.payload) if received is not None else b""
        return Outcome(frame=frame(header.id, payload + b"x"))


class Stage:
    """A worker that runs, with what it reported."""

    def __init__(self, worker: Worker, runner: FakeRunner) -> None:
        self.worker, self.runner = worker, runner
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def report(self) -> Report:
        return await asyncio.wait_for(self.reports.get(), PATIENCE_SECONDS)

    async def ended(self) -> None:
        assert self.task is not None
        await asyncio.wait_for(asyncio.shield(self.task), PATIENCE_SECONDS)


@asynccontextmanager
async def running(
    runner: FakeRunner,
    *,
    receive: ReceiveEnd | None = None,
    send: SendEnd | None = None,
    stage: int = 1,
    link_timeout_seconds: float = PATIENCE_SECONDS,
    clock: Callable[[], float] | None = None,
) -> AsyncIterator[Stage]:
    device = DeviceThread()
    box: list[Stage] = []
    worker = Worker(
        stage,
        runner,
        device,
        receive=receive,
        send=send,
        link_timeout_seconds=link_timeout_seconds,
        on_report=lambda report: box[0].reports.put_nowait(report),
        **({"clock": clock} if clock else {}),
    )
    box.append(Stage(worker, runner))
    box[0].task = asyncio.create_task(worker.run())
    try:
        yield box[0]
    finally:
        box[0].task.cancel()
        runner.gate.set()
        await asyncio.gather(box[0].task, return_exceptions=True)
        assert await device.close(PATIENCE_SECONDS)


def opened() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


async def receive(end: ReceiveEnd) -> Frame:
    return await end.receive(PATIENCE_SECONDS)


async def test_two_stages_pass_hidden_states_in_order_and_both_report() -> None:
    send, middle = inprocess.pair(4)
    first, last = FakeRunner(gate=opened()), FakeRunner(gate=opened(), last=True)
    async with running(first, send=send, stage=0) as a, running(last, receive=middle) as b:
        for i in range(20):
            header = decode(i, 3, 4)
            await a.worker.put(header)
            await b.worker.put(header)
        reports_a = [await a.report() for _ in range(20)]
        reports_b = [await b.report() for _ in range(20)]
    assert [r.microbatch_id for r in reports_a] == list(range(20)) == [r.microbatch_id for r in reports_b]
    assert {(r.stage, r.sent_bytes, r.sampled) for r in reports_a} == {(0, 1, ())}
    assert [r.sampled for r in reports_b] == [(Sampled(3, i), Sampled(4, i)) for i in range(20)]
    assert all(r.stage == 1 and r.sent_bytes == 0 for r in reports_b)
    assert [bytes(f.payload) for _, f in last.submitted if f] == [b"x"] * 20
    assert [f for _, f in first.submitted] == [None] * 20


async def test_all_submits_come_from_one_thread_that_is_not_the_loops() -> None:
    runner = FakeRunner(gate=opened(), last=True)
    async with running(runner) as stage:
        for i in range(5):
            await stage.worker.put(decode(i))
            await stage.report()
    assert len(runner.threads) == 1
    assert threading.get_ident() not in runner.threads


@pytest.mark.parametrize("header_first", [True, False])
async def test_header_and_hidden_state_may_come_in_any_order(header_first: bool) -> None:
    before, incoming = inprocess.pair(4)
    runner = FakeRunner(gate=opened(), last=True)
    async with running(runner, receive=incoming) as stage:
        steps = [lambda: stage.worker.put(decode(0)), lambda: before.send(frame(0), PATIENCE_SECONDS)]
        await steps[not header_first]()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not runner.submitted, "one of the two is missing"
        await steps[header_first]()
        assert (await stage.report()).microbatch_id == 0


async def test_a_control_microbatch_has_no_hidden_state_on_either_side() -> None:
    before, incoming = inprocess.pair(4)
    outgoing, after = inprocess.pair(4)
    runner = FakeRunner(gate=opened())
    async with running(runner, receive=incoming, send=outgoing) as stage:
        await stage.worker.put(Microbatch(0, Kind.CONTROL, release=(7,)))
        await stage.worker.put(decode(1))
        await before.send(frame(1, b"h"), PATIENCE_SECONDS)
        assert [(await stage.report()).microbatch_id for _ in range(2)] == [0, 1]
        got = await receive(after)
    assert (got.microbatch_id, bytes(got.payload)) == (1, b"hx")
    assert [f is None for _, f in runner.submitted] == [True, False]


async def test_the_device_is_at_most_one_microbatch_ahead_of_the_waiter() -> None:
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()
    runner = FakeRunner(last=True)

    def seen() -> None:
        if len(runner.submitted) == DEVICE_DEPTH:
            loop.call_soon_threadsafe(reached.set)

    runner.seen = seen
    async with running(runner) as stage:
        for i in range(4):
            await stage.worker.put(decode(i))
        await asyncio.wait_for(reached.wait(), PATIENCE_SECONDS)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(runner.submitted) == DEVICE_DEPTH
        runner.gate.set()
        assert [(await stage.report()).microbatch_id for _ in range(4)] == [0, 1, 2, 3]


async def test_a_next_stage_that_takes_nothing_bounds_what_is_held() -> None:
    outgoing, after = inprocess.pair(1)
    runner = FakeRunner(gate=opened())
    total = MAX_IN_HAND + 10
    async with running(runner, send=outgoing, stage=0) as stage:
        for i in range(total):
            await stage.worker.put(decode(i))
        # One frame stands in the link, MAX_IN_HAND are in hand: their reports come, then it stands still.
        for _ in range(MAX_IN_HAND + 1):
            await stage.report()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(runner.submitted) == MAX_IN_HAND + 1
        assert [(await receive(after)).microbatch_id for _ in range(total)] == list(range(total))


async def test_times_in_a_report_follow_their_definition() -> None:
    """compute = done − max(dispatched, previous done); wait = how long the device stood still before it."""
    now = [0.0]
    before, incoming = inprocess.pair(4)
    runner = FakeRunner(last=True)
    async with running(runner, receive=incoming, clock=lambda: now[0]) as stage:
        submitted = asyncio.Event()
        loop = asyncio.get_running_loop()
        runner.seen = lambda: loop.call_soon_threadsafe(submitted.set) and None

        async def wait_until_submitted() -> None:
            await asyncio.wait_for(submitted.wait(), PATIENCE_SECONDS)
            submitted.clear()

        await stage.worker.put(decode(0))
        await stage.worker.put(decode(1))
        now[0] = 2.0
        await before.send(frame(0), PATIENCE_SECONDS)
        await wait_until_submitted()  # ready and dispatched at 2, header there since 0
        now[0] = 3.0
        await before.send(frame(1), PATIENCE_SECONDS)
        await wait_until_submitted()  # dispatched at 3, behind the first
        now[0] = 7.0
        runner.gate.set()
        first, second = await stage.report(), await stage.report()
        assert (first.compute_seconds, first.wait_seconds) == (5.0, 2.0)
        assert (second.compute_seconds, second.wait_seconds) == (0.0, 0.0)
        runner.gate.clear()
        now[0] = 10.0
        await stage.worker.put(decode(2))
        await before.send(frame(2), PATIENCE_SECONDS)
        await wait_until_submitted()
        now[0] = 11.5
        runner.gate.set()
        third = await stage.report()
        assert (third.compute_seconds, third.wait_seconds) == (1.5, 3.0)


async def test_a_hidden_state_of_another_microbatch_ends_the_epoch() -> None:
    before, incoming = inprocess.pair(4)
    async with running(FakeRunner(gate=opened(), last=True), receive=incoming) as stage:
        await before.send(frame(8), PATIENCE_SECONDS)
        await stage.worker.put(decode(7))
        with pytest.raises(LinkMismatch, match="expects the hidden state of microbatch 7, that of 8 came"):
            await stage.ended()


async def test_a_promised_hidden_state_has_a_deadline() -> None:
    _before, incoming = inprocess.pair(4)
    async with running(FakeRunner(last=True), receive=incoming, link_timeout_seconds=0.01) as stage:
        await stage.worker.put(decode(0))
        with pytest.raises(LinkTimeout):
            await stage.ended()


async def test_a_next_stage_that_is_gone_ends_the_epoch() -> None:
    outgoing, after = inprocess.pair(4)
    await after.close()
    async with running(FakeRunner(gate=opened()), send=outgoing, stage=0) as stage:
        await stage.worker.put(decode(0))
        with pytest.raises(LinkClosed):
            await stage.ended()


@pytest.mark.parametrize("where", ["errors", "wait_errors"])
async def test_a_crash_of_the_runner_ends_the_epoch_and_names_the_microbatch(where: str) -> None:
    runner = FakeRunner(gate=opened(), last=True)
    getattr(runner, where)[1] = ZeroDivisionError("no such luck")
    async with running(runner) as stage:
        await stage.worker.put(decode(0))
        await stage.report()
        await stage.worker.put(decode(1))
        with pytest.raises(StageLost, match="crashed in microbatch 1: ZeroDivisionError: no such luck") as caught:
            await stage.ended()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_after_the_end_nothing_more_is_computed_or_reported() -> None:
    runner = FakeRunner(last=True, errors={2: ValueError("bad")})
    runner.gate.set()
    async with running(runner) as stage:
        for i in range(6):
            await stage.worker.put(decode(i))
        with pytest.raises(StageLost):
            await stage.ended()
    assert [header.id for header, _ in runner.submitted] == [0, 1, 2]
    assert stage.reports.qsize() <= 2
