"""The object that serves one pipeline: clients' sequences on one side, streams to the stages on the other.

Owns: the scheduler's clock and I/O, one event queue per sequence, the deadlines that tell a hung stage.
Does not own: decisions (``engine.scheduler``), the stage processes (``node``).
Invariant: one event loop; every sequence that was taken gets ``Finished`` or a typed error, also when the engine ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_cluster import log
from mlx_cluster._pb import stage_pb2
from mlx_cluster.config.schema import SchedulerSection
from mlx_cluster.engine.chunking import ChunkTimes
from mlx_cluster.engine.draft_stream import DraftStream
from mlx_cluster.engine.fill import Fill
from mlx_cluster.engine.memory import StageMemory
from mlx_cluster.engine.overdue import deadline_seconds
from mlx_cluster.engine.prefix import Limits, PrefixIndex
from mlx_cluster.engine.rehearsal import rehearse
from mlx_cluster.engine.rehearsal import request as canary_request
from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Drew, Effect, Ended, Failed, Policy, Read, Started
from mlx_cluster.engine.speculation import BlockCosts, Bounds, Speculation
from mlx_cluster.engine.stages import TICK_SECONDS, StageStream
from mlx_cluster.engine.waiting import Share
from mlx_cluster.errors import ClusterError, ContextLengthExceeded, LinkClosed, Recovering, StageLost, StageStartError
from mlx_cluster.microbatch import Kind, Microbatch, Report
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.request import Admitted, Event, Finished, Scored, SequenceRequest
from mlx_cluster.wire import encode_microbatch

_log = log.get("engine")

ENOUGH_STEPS = 64  # decode steps until their mean says something of a stage
_DRAFT_OPEN_SECONDS = 25.0
_SILENCE_SECONDS = 6.0  # a stage answers ticks at once, also while it computes; longer silence is a frozen process
_NEIGHBOUR_SECONDS = 0.1  # for the stream of a stage that died to break after its neighbour has said so
_LOOK_SECONDS = 0.25  # how often deadlines are looked at
_REHEARSAL_SECONDS = 3.0  # of an idle pipeline, for measuring its steps


@dataclass(slots=True)
class _Client:
    """One sequence's way back to whoever waits for it. The queue is bounded by ``max_tokens`` by construction."""

    request: SequenceRequest
    events: asyncio.Queue[Event | ClusterError] = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class _Trip:
    """A microbatch on its way: when it left, what it was, and how many stages have reported it."""

    microbatch: Microbatch
    left_at: float
    chunks: tuple[tuple[int, int], ...]
    reported: int = 0
    held: Report | None = None  # the last stage's, where all stages must have reported first
    alone: bool = False  # nothing else was in the pipeline while it travelled
    compute_seconds: float = 0.0


@dataclass(slots=True)
class _Steps:
    """Decode steps of one stage. All stages see the same steps, so their means compare."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


class PipelineEngine:
    """Implements ``request.Engine`` for one epoch of one plan."""

    def __init__(
        self,
        plan: Plan,
        epoch: Epoch,
        stage_addresses: Sequence[str],
        settings: SchedulerSection,
        *,
        max_context: int,
        report_deadline_seconds: float,
        prefix: Limits | None = None,
        shares: Mapping[str, Share] | None = None,
        memory: Sequence[StageMemory] = (),
        drafts: Bounds | None = None,
        helper: Callable[[PipelineEngine], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.plan = plan
        self.epoch = epoch
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.hung: int | None = None  # the stage that ended the epoch by its silence, if one did
        self._max_context = max_context
        self._report_deadline_seconds = report_deadline_seconds
        self._max_rows = settings.max_rows
        self._fill = Fill(plan.num_stages, settings.max_groups)
        self._block_costs = BlockCosts(plan.num_stages, lambda: self._fill.hop_seconds)
        self._speculation = Speculation(drafts, self._block_costs) if drafts is not None else None
        self._helper = (
            helper if drafts is not None else None
        )  # runs beside the engine once that is ready: it brings a draft model
        self._helping: asyncio.Task[None] | None = None
        self._draft_stream: DraftStream | None = None
        self._draft_state = "starting" if self._helper is not None else "none"
        self._chunk_times = ChunkTimes(plan.num_stages)
        self._scheduler = Scheduler(
            Policy(
                num_stages=plan.num_stages,
                max_rows=settings.max_rows,
                max_queue=settings.max_queue,
                prefill_chunk=settings.prefill_chunk,
                num_groups=self._fill.num_groups,
                max_prompts=settings.max_prompts,
                shares=shares or {},
                ageing_seconds=settings.ageing_seconds,
                max_groups=self._fill.max_groups,
                memory=tuple(memory),
                step_seconds=self._fill.step_seconds,
                chunk_times=self._chunk_times,
                itl_budget_seconds=settings.itl_budget_ms / 1000,
                min_chunk=settings.min_chunk,
                max_wait_seconds=settings.max_wait_ms / 1000,
            ),
            PrefixIndex(prefix) if prefix is not None else None,
            self._speculation,
        )
        self._has_disk = prefix is not None and prefix.disk_max_bytes > 0
        self._clients: dict[int, _Client] = {}
        self._trips: dict[int, _Trip] = {}
        self._error: ClusterError | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._rehearsal: asyncio.Task[None] | None = None
        self._was_idle = False
        self._unaccounted: dict[int, int] = {}  # stage → rows, once found
        self._alarm: asyncio.TimerHandle | None = None
        self._reported_at = 0.0  # when some stage reported something last
        self._num_tokens = self._num_fallbacks = 0
        self._busy_seconds = [0.0] * plan.num_stages
        self._sent_bytes, self._saved_bytes = [0] * plan.num_stages, [0] * plan.num_stages
        self._steps = [_Steps() for _ in range(plan.num_stages)]
        self._streams = [
            StageStream(
                index,
                address,
                plan,
                str(epoch),
                capacity=1024,
                on_report=self._on_report,
                on_lost=self._on_stage_lost,
            )
            for index, address in enumerate(stage_addresses)
        ]

    # -- life -----------------------------------------------------------------------------------------

    async def start(self, timeout_seconds: float) -> None:
        """Open the stream to every stage. Raises ``StageStartError`` when one does not answer."""
        self._watchdog = asyncio.get_running_loop().create_task(self._watch(), name="engine watchdog")
        await asyncio.gather(*(stream.open(timeout_seconds) for stream in self._streams))
        if self._has_disk:
            saved = await asyncio.gather(*(stream.saved(timeout_seconds) for stream in self._streams))
            restored = self._scheduler.restore_prefixes(saved, asyncio.get_running_loop().time())
            _log.info("prefixes on the stages' disks", usable=restored, by_stage=[len(entries) for entries in saved])
        if self._error is not None:
            raise StageStartError(self.lost_reason)

    async def canary(self, timeout_seconds: float) -> None:
        """Send two tokens through all stages: a prefill and a decode step. Raises ``StageStartError``.

        Afterwards, as long as nobody wants anything, steps of several sizes are timed.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                async with contextlib.aclosing(self.generate(canary_request(self.plan.model.id, 2))) as events:
                    async for _event in events:
                        pass
        except TimeoutError:
            raise StageStartError(f"no token came through all stages within {timeout_seconds:g} s") from None
        except ClusterError as error:
            raise StageStartError(f"the first token did not come through all stages: {error}") from error
        self._rehearsal = asyncio.get_running_loop().create_task(self._rehearse(), name="rehearsal")
        if self._helper is not None:
            self._helping = asyncio.get_running_loop().create_task(self._helper(self), name="draft model")

    async def _rehearse(self) -> None:
        model = self.plan.model.id
        generate = functools.partial(self._generate, rehearsed=True)
        try:
            await rehearse(generate, model, self._fill, max_rows=self._max_rows, seconds=_REHEARSAL_SECONDS)
        except* ClusterError as errors:  # whoever watches the engine hears of a lost stage; nothing else is lost here
            _log.info("the rehearsal ended early", reason=str(errors.exceptions[0]))

    async def rehearsed(self) -> None:
        """Wait until the steps were timed, or real work came first."""
        if self._rehearsal is not None:
            await asyncio.wait([self._rehearsal])

    # -- a draft model ---------------------------------------------------------------------------------

    async def attach_drafts(self, address: str, plan: Plan, epoch: Epoch) -> None:
        """A process at ``address`` drafts from now on. Raises ``StageStartError`` when it does not answer."""
        if self._speculation is None:
            return
        stream = DraftStream(
            address,
            plan,
            epoch,
            max_ahead=2 * self._speculation.bounds.max_draft,
            on_draft=self._pump,
            on_lost=self.drafts_unavailable,
        )
        self._draft_stream = stream
        await stream.open(_DRAFT_OPEN_SECONDS)
        self._speculation.model = stream.model
        self._draft_state = "ready"

    def drafts_unavailable(self, reason: str) -> None:
        """Go on without a draft model; the text itself is still looked at."""
        if self._draft_state.startswith("unavailable"):
            return
        self._draft_state = f"unavailable: {reason}"
        _log.warning("no drafts from a model", pipeline=self.plan.pipeline, reason=reason)
        if self._speculation is not None:
            self._speculation.model = None
        if self._error is None:
            self._pump()  # a step may be waiting for it

    async def _end_drafts(self) -> None:
        stream = self._draft_stream
        if stream is not None:
            await stream.close()  # before its process ends, which would be news
        if self._helping is not None:
            self._helping.cancel()
            await asyncio.wait([self._helping])
        if self._draft_stream is not None and self._draft_stream is not stream:
            await self._draft_stream.close()

    async def stop(self, error: ClusterError | None = None) -> None:
        """End: running sequences get ``error`` (default ``Recovering``); streams are closed."""
        self._fail(error or Recovering("the engine is shutting down"))
        await self._end_rehearsal()
        await self._end_drafts()
        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog
        await asyncio.gather(*(stream.close() for stream in self._streams))

    # -- clients --------------------------------------------------------------------------------------

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """See ``request.Engine``. Closing the generator cancels the sequence on every stage."""
        return self._generate(request, rehearsed=False)

    async def _end_rehearsal(self) -> None:
        rehearsal, self._rehearsal = self._rehearsal, None
        if rehearsal is not None and not rehearsal.done():
            rehearsal.cancel()
            await asyncio.wait([rehearsal])

    async def _generate(self, request: SequenceRequest, *, rehearsed: bool) -> AsyncGenerator[Event]:
        if not rehearsed:
            await self._end_rehearsal()
        if self._error is not None:
            raise self._error
        request = self._within_context(request)
        sequence_id = self._scheduler.submit(request, asyncio.get_running_loop().time())
        client = self._clients[sequence_id] = _Client(request)
        try:
            self._pump()
            while True:
                event = await client.events.get()
                if isinstance(event, ClusterError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if self._clients.pop(sequence_id, None) is not None and self._error is None:
                self._scheduler.cancel(sequence_id)
                self._pump()

    @property
    def running(self) -> int:
        """Sequences that were taken and have not ended."""
        return len(self._clients)

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """The mean decode step of each stage; empty until each has reported enough of them."""
        if min(steps.count for steps in self._steps) < ENOUGH_STEPS:
            return ()
        return tuple(steps.seconds / steps.count for steps in self._steps)

    def statistics(self) -> dict[str, Any]:
        return {
            **self._scheduler.statistics(),
            "tokens": self._num_tokens,
            "draft_model": self._draft_state,
            **({"draft_model_ready": int(self._draft_state == "ready")} if self._helper is not None else {}),
            "prefix_fallbacks": self._num_fallbacks,
            "unaccounted": dict(self._unaccounted),
            "held": [(s.held.rows, s.held.entries) if s.held is not None else None for s in self._streams],
            "sent_bytes": list(self._sent_bytes),
            "saved_bytes": list(self._saved_bytes),
            "busy_seconds": [round(seconds, 6) for seconds in self._busy_seconds],
        }

    def _within_context(self, request: SequenceRequest) -> SequenceRequest:
        if not request.prompt:
            raise ContextLengthExceeded("the prompt has no tokens; send at least one", param="prompt")
        needed = len(request.prompt) + request.max_tokens
        if needed > self._max_context:
            raise ContextLengthExceeded(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} requested ones are {needed}, "
                f"the context holds {self._max_context}: shorten the prompt or lower max_tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return request

    # -- the loop: send what the scheduler wants, hand out what comes back ----------------------------------

    def _pump(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._error is None and (microbatch := self._scheduler.next(now)) is not None:
            header = stage_pb2.EngineMessage(microbatch=encode_microbatch(microbatch)).SerializeToString()
            self._travels_with_others()
            chunks = self._scheduler.chunks(microbatch.id)
            self._trips[microbatch.id] = _Trip(microbatch, now, chunks, alone=not self._trips)
            for stream in self._streams:
                stream.put(header)
        self._apply(self._scheduler.take_effects())
        self._wake_at(self._scheduler.wakes_at)

    def _wake_at(self, at: float | None) -> None:
        """Pump again at that time, unless something does before."""
        if self._error is not None:
            at = None
        if self._alarm is not None and self._alarm.when() != at:
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None and at is not None:
            self._alarm = asyncio.get_running_loop().call_at(at, self._woken)

    def _woken(self) -> None:
        self._alarm = None
        self._pump()

    def _travels_with_others(self) -> None:
        for trip in self._trips.values():
            trip.alone = False

    def _on_report(self, report: Report) -> None:
        if self._error is not None:
            return
        trip = self._trips.get(report.microbatch_id)
        if trip is None:
            return
        trip.reported += 1
        self._reported_at = asyncio.get_running_loop().time()
        last = report.stage == len(self._streams) - 1
        everybody = trip.reported == len(self._streams)
        self._measure(trip, report, everybody)
        if everybody:
            del self._trips[report.microbatch_id]
        if report.missing:
            self._num_fallbacks += self._scheduler.restart_rows(report.missing)
        if report.failed and not last:
            self._scheduler.fail_rows(report.failed)
        if last and not everybody and self._scheduler.awaits_all_stages(report.microbatch_id):
            trip.held = report
            return
        if last or (everybody and trip.held is not None):
            self._apply(self._scheduler.complete(trip.held or report))
        elif not (report.missing or report.failed):
            return
        self._pump()

    def _measure(self, trip: _Trip, report: Report, everybody: bool) -> None:
        self._busy_seconds[report.stage] += report.compute_seconds
        self._sent_bytes[report.stage] += report.sent_bytes
        self._saved_bytes[report.stage] += report.saved_bytes
        if trip.microbatch.kind in (Kind.DECODE, Kind.VERIFY) and len(trip.microbatch.rows) == 1:
            self._block_costs.observe(report.stage, len(trip.microbatch.tokens), report.compute_seconds)
        if trip.microbatch.kind is Kind.PREFILL:
            self._chunk_times.observe(report.stage, trip.chunks, report.compute_seconds)
        if trip.microbatch.kind is not Kind.DECODE:
            return
        self._steps[report.stage].add(report.compute_seconds)
        self._fill.observe(report.stage, len(trip.microbatch.rows), report.compute_seconds)
        trip.compute_seconds += report.compute_seconds
        if everybody and trip.alone:
            self._fill.observe_trip(asyncio.get_running_loop().time() - trip.left_at, trip.compute_seconds)

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            client = self._clients.get(effect.sequence)
            if client is None:
                continue
            match effect:
                case Drew(_, token):
                    self._num_tokens += 1
                    client.events.put_nowait(token)
                case Started(_, cached):
                    client.events.put_nowait(Admitted(min(cached, len(client.request.prompt))))
                case Read(_, tokens):
                    client.events.put_nowait(Scored(tokens))
                case Ended(_, reason, completion, cached, pooled):
                    # A resumed sequence may also have found what an earlier attempt emitted.
                    num_prompt = len(client.request.prompt)
                    client.events.put_nowait(Finished(reason, num_prompt, completion, min(cached, num_prompt), pooled))
                    del self._clients[effect.sequence]
                case Failed(_, error):
                    client.events.put_nowait(error)
                    del self._clients[effect.sequence]

    # -- trouble ------------------------------------------------------------------------------------------

    def _on_stage_lost(self, index: int, reason: str) -> None:
        stage = self.plan.stages[index]
        error = StageLost(f"stage {index} (layers {stage.start}…{stage.end - 1}) on node {stage.node_id}: {reason}")
        if reason.startswith(f"{LinkClosed.code}: "):
            # When a stage dies its neighbour may speak first; what is wrong with the stage itself is the better cause.
            asyncio.get_running_loop().call_later(_NEIGHBOUR_SECONDS, self._fail, error)
        else:
            self._fail(error)

    def _fail(self, error: ClusterError) -> None:
        """The epoch is over: every waiting client hears why, nothing more is sent."""
        if self._error is not None:
            return
        self._error = error
        self.lost_reason = str(error)
        for client in self._clients.values():
            client.events.put_nowait(error)
        self._clients.clear()
        self._wake_at(None)
        self.lost.set()

    async def _watch(self) -> None:
        """Ticks, and the deadline on reports: a stage that hangs is found here."""
        loop = asyncio.get_running_loop()
        ticked_at = loop.time()
        while self._error is None:
            await asyncio.sleep(_LOOK_SECONDS)
            now = loop.time()
            self._check_silence(now)
            self._check_reports(now)
            if now - ticked_at < TICK_SECONDS:
                continue
            ticked_at = now
            for stream in self._streams:
                stream.tick()
            if self._draft_stream is not None:
                self._draft_stream.tick(now, _SILENCE_SECONDS)
            self._audit()

    def _audit(self) -> None:
        """Whoever is idle audits its own books, and the stages': a row that nobody has is memory that nobody frees."""
        was_idle, self._was_idle = self._was_idle, self._scheduler.idle and not self._trips
        if not self._was_idle:
            return
        self._scheduler.audit()
        if not was_idle or self._unaccounted:
            return  # what the stages said last may be older than this quiet
        self._unaccounted = {s.index: s.held.rows for s in self._streams if s.held is not None and s.held.rows}
        if self._unaccounted:
            _log.error("stages hold rows that nobody has", pipeline=self.plan.pipeline, rows=self._unaccounted)

    def _check_silence(self, now: float) -> None:
        for stream in self._streams:
            if stream.opened and (silent_seconds := stream.silent_seconds(now)) > _SILENCE_SECONDS:
                self._on_stage_hung(stream.index, f"silent for {silent_seconds:.1f} s")
                return

    def _check_reports(self, now: float) -> None:
        oldest = next(iter(self._trips.values()), None)
        if oldest is None:
            return
        waited = now - max(oldest.left_at, self._reported_at)  # where others are reported there is no hang
        if waited > deadline_seconds(
            self._report_deadline_seconds, oldest.microbatch, oldest.chunks, self._chunk_times, self._fill
        ):
            hung = min(oldest.reported, len(self._streams) - 1)
            self._on_stage_hung(hung, f"microbatch {oldest.microbatch.id} is not reported after {waited:.0f} s")

    def _on_stage_hung(self, index: int, reason: str) -> None:
        if self._error is None:
            self.hung = index
        self._on_stage_lost(index, reason)
