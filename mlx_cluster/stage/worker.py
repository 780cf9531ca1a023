"""The loop of one stage: header and hidden state in; hidden state, or tokens, and a report out.

Owns: the pairing of headers with frames, the hand-over between the event loop, the mlx thread and the waiter thread,
the deadlines on both links and the times in a report.
Does not own: the links, what the runner computes, or the stream to the engine.
Invariant: microbatches are executed, sent and reported in the order of their headers; the first error ends the epoch.

    headers ─┐                 mlx thread            waiter thread
             ├─ pair (loop) ──> runner.submit ──────> pending.wait ──> (loop) ─┬─> report
    frames ──┘                  at most two on the device                      └─> send, one after the other
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from mlx_cluster import log
from mlx_cluster.errors import ClusterError, LinkMismatch, StageLost
from mlx_cluster.microbatch import Frame, Kind, Microbatch, Outcome, Pending, Report, Runner
from mlx_cluster.stage.device import DeviceThread
from mlx_cluster.transport import framing
from mlx_cluster.transport.link import ReceiveEnd, SendEnd

# The device computes one microbatch while the next is built and queued behind it: more would only add latency.
DEVICE_DEPTH = 2
# Microbatches between pairing and their frame's hand-over: bounds the frames that a slow next stage makes us hold.
MAX_IN_HAND = 6
# Headers wait here for their hidden states; beyond it the engine's stream is not read until some are done.
MAX_HEADERS = 256

logger = log.get("stage.worker")


@dataclass(slots=True)
class _Job:
    """One microbatch on its way through the threads."""

    header: Microbatch
    frame: Frame | None
    arrived_at: float  # the header was here
    ready_at: float  # its hidden state was here too
    dispatched_at: float = 0.0
    pending: Pending | None = None


class Worker:
    """Executes the microbatches of one epoch on one stage.

    ``receive`` is None on stage 0 and ``send`` on the last stage. ``on_report`` is called in the event loop.
    """

    def __init__(
        self,
        stage: int,
        runner: Runner,
        device: DeviceThread,
        *,
        receive: ReceiveEnd | None,
        send: SendEnd | None,
        link_timeout_seconds: float,
        on_report: Callable[[Report], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stage, self._runner, self._device = stage, runner, device
        self._receive, self._send = receive, send
        self._timeout_seconds = link_timeout_seconds
        self._on_report = on_report
        self._clock = clock
        self._headers: asyncio.Queue[tuple[Microbatch, float]] = asyncio.Queue(MAX_HEADERS)
        self._outbox: asyncio.Queue[Frame] = asyncio.Queue()  # bounded by _in_hand
        self._in_hand = asyncio.Semaphore(MAX_IN_HAND)
        self._depth = asyncio.Semaphore(DEVICE_DEPTH)
        self._waiting: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._crashed: asyncio.Future[None] = self._loop.create_future()
        self._over = False

    async def put(self, header: Microbatch) -> None:
        """The next header of the engine's stream. Waits when ``MAX_HEADERS`` are queued."""
        await self._headers.put((header, self._clock()))

    async def run(self) -> None:
        """Work until the epoch is over; raises what ended it, always a ``ClusterError``. Cancel it to stop."""
        waiter = threading.Thread(target=self._wait_for_device, name="waiter", daemon=True)
        waiter.start()
        tasks = [
            asyncio.create_task(self._feed(), name="pair headers with hidden states"),
            asyncio.create_task(self._deliver(), name="send hidden states"),
        ]
        try:
            done, _ = await asyncio.wait([*tasks, self._crashed], return_when=asyncio.FIRST_COMPLETED)
            # A crash of the runner is the cause of whatever else failed in the same moment.
            await (self._crashed if self._crashed in done else done.pop())
        except ClusterError:
            raise
        except Exception as error:
            logger.exception("the stage's loop failed", stage=self._stage)
            raise StageLost(f"stage {self._stage} failed: {_describe(error)}") from error
        finally:
            self._over = True
            self._crashed.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._waiting.put(None)

    # -- event loop ---------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while True:
            header, arrived_at = await self._headers.get()
            await self._in_hand.acquire()
            frame = None
            if self._receive is not None and header.kind is not Kind.CONTROL:
                frame = await self._receive.receive(self._timeout_seconds)
                if frame.microbatch_id != header.id:
                    raise LinkMismatch(
                        f"stage {self._stage} expects the hidden state of microbatch {header.id}, "
                        f"that of {frame.microbatch_id} came: the stages are out of step"
                    )
            ready_at = self._clock()
            await self._depth.acquire()
            self._device.post(functools.partial(self._dispatch, _Job(header, frame, arrived_at, ready_at)))

    def _finish(self, job: _Job, outcome: Outcome, compute_seconds: float, wait_seconds: float) -> None:
        """Called in the loop when a microbatch is computed; the order of what it wakes is the order of urgency.

        The next stage waits for the frame and the engine for the report, while the device is busy with the microbatch
        behind; only then may the mlx thread build another graph, which takes the GIL for milliseconds.
        """
        if self._over:
            return
        header = job.header
        sends = self._send is not None and header.kind is not Kind.CONTROL
        sent_bytes = saved_bytes = 0
        if not sends:
            self._in_hand.release()
        elif outcome.frame is None:
            self._crash(header.id, LinkMismatch("the runner gave no hidden state for the next stage"))
            return
        else:
            sent_bytes = memoryview(outcome.frame.payload).nbytes
            saved_bytes = framing.plain_bytes(outcome.frame.tensors) - sent_bytes
            self._outbox.put_nowait(outcome.frame)
        report = Report(
            microbatch_id=header.id,
            stage=self._stage,
            compute_seconds=compute_seconds,
            wait_seconds=wait_seconds,
            sent_bytes=sent_bytes,
            saved_bytes=saved_bytes,
            sampled=outcome.sampled,
            failed=outcome.failed,
            missing=outcome.missing,
            scored=outcome.scored,
            pooled=outcome.pooled,
        )
        self._loop.call_soon(self._report, report)
        self._depth.release()

    def _report(self, report: Report) -> None:
        if not self._over:
            self._on_report(report)

    async def _deliver(self) -> None:
        while True:
            frame = await self._outbox.get()
            assert self._send is not None
            await self._send.send(frame, self._timeout_seconds)
            self._in_hand.release()

    def _crash(self, microbatch_id: int, error: BaseException) -> None:
        self._over = True
        if self._crashed.done():
            return
        logger.error("a microbatch crashed", stage=self._stage, microbatch=microbatch_id, exc_info=error)
        if not isinstance(error, ClusterError):
            cause = StageLost(f"stage {self._stage} crashed in microbatch {microbatch_id}: {_describe(error)}")
            cause.__cause__ = error
            error = cause
        self._crashed.set_exception(error)

    # -- mlx thread -----------------------------------------------------------------------------------

    def _dispatch(self, job: _Job) -> None:
        if self._over:
            return
        job.dispatched_at = self._clock()
        try:
            job.pending = self._runner.submit(job.header, job.frame)
        except Exception as error:  # noqa: BLE001  # the root of a microbatch: ``_crash`` logs it and ends the epoch
            self._over = True  # at once: what stands behind it in the queue must not run
            self._call(self._crash, job.header.id, error)
            return
        job.frame = None
        self._waiting.put(job)

    # -- waiter thread --------------------------------------------------------------------------------

    def _wait_for_device(self) -> None:
        previous: float | None = None  # when the microbatch before was done
        while (job := self._waiting.get()) is not None:
            assert job.pending is not None
            try:
                outcome = job.pending.wait()
            except Exception as error:  # noqa: BLE001  # the root of a microbatch: ``_crash`` logs it
                self._over = True
                self._call(self._crash, job.header.id, error)
                continue
            done = self._clock()
            # Before the first one nothing was done: waiting begins with its header.
            waited = max(0.0, job.ready_at - (job.arrived_at if previous is None else previous))
            compute = done - (job.dispatched_at if previous is None else max(job.dispatched_at, previous))
            previous = done
            self._call(self._finish, job, outcome, compute, waited)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(callback, *args)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
