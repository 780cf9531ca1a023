"""Decides what the pipeline does next. Pure: no clock, no I/O, no mlx.

Owns: the rows, the groups, the credits; every decision of a pipeline is made here and nowhere else.
Does not own: the order of who waits (``engine.waiting``), streams, deadlines, clients (``engine.engine``).
Invariants: a row is in one group at most; a group has one decode step in flight at most; never more than
``credits`` microbatches in flight; every sequence that was taken ends exactly once.

How a sequence lives: waiting → prefill (in chunks, back to back while nothing decodes) → loose (has a token, waits for
a group at a border) → grouped (decodes) → ended; its row is released with the next microbatch, whatever that is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mlx_cluster.engine.groups import Groups
from mlx_cluster.engine.memory import Charge, KvBook, padded
from mlx_cluster.engine.prefill import Prefill
from mlx_cluster.engine.prefix import PrefixIndex
from mlx_cluster.engine.prefix_book import PrefixBook
from mlx_cluster.engine.sequence import (
    Drew,
    Effect,
    Ended,
    Failed,
    Group,
    InFlight,
    Policy,
    Read,
    SequenceState,
    Started,
    row_spec,
)
from mlx_cluster.engine.speculation import Speculation
from mlx_cluster.engine.waiting import WaitingQueue
from mlx_cluster.errors import ContextLengthExceeded, QueueTimeout, RowFailed
from mlx_cluster.microbatch import FailedRow, Kind, Load, Microbatch, Report, RowSpec, Sampled, Saved, Trim
from mlx_cluster.request import FinishReason, SequenceRequest, Token


class Scheduler:
    """A state machine: ``submit`` and ``cancel`` sequences, ask ``next`` for work, tell it each ``complete``."""

    def __init__(
        self, policy: Policy, prefix: PrefixIndex | None = None, speculation: Speculation | None = None
    ) -> None:
        self.policy = policy
        self._book = PrefixBook(prefix)
        self._waiting: WaitingQueue[SequenceState] = WaitingQueue(
            policy.max_queue, policy.shares, ageing_seconds=policy.ageing_seconds
        )
        self._memory = KvBook(policy.memory)
        self._groups = Groups(policy, self._memory)
        self._prefill = Prefill(policy, self._book, self._groups.pace)
        self._live: dict[int, SequenceState] = {}
        self._rows: dict[int, SequenceState] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._speculation = speculation
        self._release: list[int] = []
        self._trim: list[Trim] = []
        self._held_until: float | None = None  # when a group that waits for a draft goes on without it
        self._effects: list[Effect] = []
        self._next_sequence = 0
        self._next_row = 0
        self._next_microbatch = 0
        self._company_until: float | None = None  # until when a lone prompt is held back
        self._num_preemptions = self._num_prefilled = 0
        self._granted = 0  # credits when the last microbatch left; groups that end later shrink ``credits``

    # -- from the engine --------------------------------------------------------------------------

    def submit(self, request: SequenceRequest, now: float = 0.0) -> int:
        """Take a sequence; returns its id. Raises ``Overloaded`` when it may not wait (see ``engine.waiting``).

        Resumed work (``emitted``) goes before new work and past the bound: it was admitted once already. What no stage
        could hold even alone is refused with ``ContextLengthExceeded``.
        """
        self._check_memory(request)
        sequence = SequenceState(self._next_sequence, request, request.prompt + request.emitted, arrived_at=now)
        sequence.may_reuse = not request.reads_prompt
        evicted = self._waiting.push(sequence, now, room=max(0, self._free_rows()))
        self._next_sequence += 1
        self._live[sequence.id] = sequence
        if evicted is not None:
            del self._live[evicted.id]
            self._effects.append(Failed(evicted.id, self._waiting.overloaded(now)))
        return sequence.id

    def expire(self, now: float) -> None:
        """Give up who waited for a row as long as it may; they end with ``QueueTimeout``."""
        for sequence in self._waiting.expire(now):
            del self._live[sequence.id]
            error = QueueTimeout(
                f"no row became free within {sequence.request.queue_seconds:g} s (api_gateway.queue_timeout); "
                f"{len(self._waiting)} sequences are waiting: come back later",
                retry_after_seconds=self._waiting.retry_after_seconds(now),
            )
            self._effects.append(Failed(sequence.id, error))

    def restore_prefixes(self, saved: Sequence[Sequence[Saved]], now: float) -> int:
        """What the stages have on their disks, by stage; gives how many entries can be used again."""
        return self._book.restore(saved, now)

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it is; its row is released in order. Unknown ids are ignored."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._end(sequence)

    def awaits_all_stages(self, microbatch_id: int) -> bool:
        """Whether its tokens count only when every stage has reported it.

        A row that started from a prefix entry: a stage that turns out not to have the entry says so in its own report,
        which may arrive after the last stage's.
        """
        item = self._in_flight.get(microbatch_id)
        return (
            item is not None
            and item.microbatch.sample
            and any(s.entry is not None for s in item.sequences)
            and (item.microbatch.kind is Kind.PREFILL)
        )

    def complete(self, report: Report) -> list[Effect]:
        """The last stage's report of a microbatch: its tokens, and a credit back."""
        done = self._in_flight.pop(report.microbatch_id, None)
        if done is None:
            return self._take_effects()
        self.fail_rows(report.failed)
        self._tell_of_prompts(done, report)
        sampled: dict[int, list[Sampled]] = {}
        for one in report.sampled:
            sampled.setdefault(one.row, []).append(one)
        for sequence in done.sequences:
            drawn = sampled.get(sequence.row)
            if drawn is None or sequence.id not in self._live:
                continue
            if done.microbatch.kind is Kind.VERIFY:
                self._verified(sequence, done.microbatch, drawn)
                continue
            self._draw(sequence, drawn[0])
            if done.microbatch.kind is Kind.PREFILL and sequence.id in self._live:
                self._groups.add(sequence)
        if done.group is not None:
            self._groups.returned(done.group)
        return self._take_effects()

    def _tell_of_prompts(self, done: InFlight, report: Report) -> None:
        """What was read off the positions of a prompt; a prompt that was computed again tells nothing twice."""
        pooled = {pooled.row: pooled.values for pooled in report.pooled}
        for sequence in done.sequences if report.scored or pooled else ():
            if sequence.id not in self._live:
                continue
            fresh = tuple(
                Token(s.position, s.token_id, s.logprob, s.top)
                for s in report.scored
                if s.row == sequence.row and s.position >= sequence.num_read
            )
            if fresh:
                sequence.num_read = fresh[-1].index + 1
                self._effects.append(Read(sequence.id, fresh))
            if sequence.row in pooled:
                values = pooled[sequence.row]
                self._end(sequence)
                self._effects.append(Ended(sequence.id, "stop", 0, sequence.cached, values))

    def fail_rows(self, failed: Sequence[FailedRow]) -> None:
        """Rows that some stage could not execute: their sequences end with ``RowFailed``, others go on."""
        for failure in failed:
            sequence = self._rows.get(failure.row)
            if sequence is not None:
                self._book.disown(sequence)
                self._end(sequence)
                self._effects.append(Failed(sequence.id, RowFailed(failure.message)))

    def restart_rows(self, rows: Sequence[int]) -> int:
        """Rows whose prefix entry some stage does not have: start them again without it; gives how many."""
        restarted = 0
        for row in rows:
            sequence = self._rows.get(row)
            if sequence is None:
                continue
            self._book.disown(sequence)
            self._detach(sequence)
            sequence.prefilled = sequence.cached = 0
            sequence.entry, sequence.may_reuse = None, False  # once is enough: two such rows could chase each other
            self._give_row(sequence)
            self._prefill.add_first(sequence)
            restarted += 1
        return restarted

    def next(self, now: float = 0.0) -> Microbatch | None:
        """The next microbatch to send to every stage, or None when nothing may go now."""
        self.expire(now)
        if len(self._in_flight) >= self.credits:
            return None
        self._admit(now)
        self._book.plan_stores(now)
        if self._prefill.is_due(self._groups.steps_per_cycle) and not self._awaits_company(now):
            return self._chunk(now)
        self._held_until = None
        is_held = functools.partial(self._is_held, now)
        group = self._groups.next_step(self._preempt_youngest, is_held)
        while group is None and self._is_stuck and self._preempt_youngest():
            group = self._groups.next_step(self._preempt_youngest, is_held)
        if group is not None:
            return self._step(group, now)
        if (self._release or self._book.has_orders) and not self._in_flight:
            return self._dispatch(Kind.CONTROL)
        return None

    def chunks(self, microbatch_id: int) -> tuple[tuple[int, int], ...]:
        """(position, length) of each row that a prefill in flight computes; padding counts."""
        return self._in_flight[microbatch_id].chunks

    def take_effects(self) -> list[Effect]:
        """Effects of ``next`` and ``fail_rows`` since the last call."""
        return self._take_effects()

    # -- what it may say of itself -----------------------------------------------------------------

    @property
    def credits(self) -> int:
        return max(self.policy.num_stages, len(self._groups)) + 2

    @property
    def wakes_at(self) -> float | None:
        """When ``next`` should be asked again even though nothing happened; may be too early, never too late."""
        times = [at for at in (self._company_until, self._waiting.next_expiry, self._held_until) if at is not None]
        return min(times, default=None)

    @property
    def num_decoding(self) -> int:
        return self._groups.num_rows

    @property
    def idle(self) -> bool:
        return not (self._live or self._in_flight or self._release or self._book.has_orders)

    def tokens_of(self, row: int) -> tuple[int, ...]:
        """Prompt and output so far of a living row."""
        sequence = self._rows[row]
        return (*sequence.tokens, *sequence.emitted)

    def statistics(self) -> dict[str, int]:
        return {
            "waiting": len(self._waiting),
            "prefilling": len(self._prefill),
            "decoding": self.num_decoding,
            "groups": len(self._groups),
            "rows": len(self._rows),
            "in_flight": len(self._in_flight),
            "preemptions": self._num_preemptions,
            "prefilled_tokens": self._num_prefilled,
            **self._memory.statistics(),
            **self._book.statistics(),
            **(self._speculation.statistics() if self._speculation is not None else {}),
        }

    def audit(self) -> None:
        """Raise ``AssertionError`` when the books do not balance (called when idle, and by tests after every step)."""
        placed = [*self._prefill, *self._groups.rows()]
        pending_first = {
            s.id
            for item in self._in_flight.values()
            if item.microbatch.kind is Kind.PREFILL and item.microbatch.sample
            for s in item.sequences
            if s.row in item.microbatch.rows  # else it was restarted meanwhile
        }
        live_placed = [s.id for s in placed] + [i for i in pending_first if i in self._live]
        assert len(set(live_placed)) == len(live_placed), "a sequence is in two places"
        assert set(live_placed) | {s.id for s in self._waiting} == set(self._live), "a live sequence is nowhere"
        assert {s.row for s in self._rows.values()} == set(self._rows), "a row belongs to somebody else"
        assert len(self._in_flight) <= self._granted, "more microbatches than credits"
        assert all(group.members or group.in_flight for group in self._groups), "an empty group was kept"

    # -- admission ------------------------------------------------------------------------

    def _free_rows(self) -> int:
        return self.policy.max_rows - len(self._rows)

    def _admit(self, now: float) -> None:
        while self._free_rows() > 0:
            sequence = self._waiting.peek(now)
            if sequence is None or not self._has_memory_for(sequence):
                return
            self._waiting.pop(now)
            if not self._memory.fits_alone(len(sequence.tokens) + 1):
                self._finish(sequence, "length")  # it had grown to all there is when it was preempted
                continue
            self._give_row(sequence)
            self._prefill.add(sequence)
            if not sequence.started:
                sequence.started = True
                self._effects.append(Started(sequence.id, self._book.num_reusable(sequence, now)))

    def _awaits_company(self, now: float) -> bool:
        """Whether a prompt that could share its microbatch, and has nobody to share it with yet, is held back."""
        self._company_until = None
        if not self.policy.max_wait_seconds or self.policy.max_prompts == 1 or len(self._prefill) != 1:
            return False
        lone = next(iter(self._prefill))
        until = lone.arrived_at + self.policy.max_wait_seconds
        if lone.prefilled or lone.request.emitted or 2 * len(lone.tokens) > self.policy.prefill_chunk or now >= until:
            return False
        self._company_until = until
        return True

    def _give_row(self, sequence: SequenceState) -> None:
        sequence.row = self._next_row
        self._next_row += 1
        self._rows[sequence.row] = sequence
        self._memory.admit(sequence.row, len(sequence.tokens))

    # -- memory -----------------------------------------------------------------------------------------

    def _check_memory(self, request: SequenceRequest) -> None:
        positions = len(request.prompt) + len(request.emitted) + 1
        if not self._memory.fits_alone(positions):
            stage, needed, budget = self._memory.tightest(positions)
            raise ContextLengthExceeded(
                f"{positions - 1} tokens need {needed} bytes for keys and values on stage {stage}, which has {budget}: "
                "shorten the prompt, or raise runtime.kv_budget there",
                param="prompt",
                code="context_length_exceeded",
            )

    def _has_memory_for(self, sequence: SequenceState) -> bool:
        """Whether its prompt fits, in a batch as well, with a block for every row to grow into.

        Without that margin who was admitted last would be preempted at the next border, and admitted again.
        """
        if not self._memory.is_bounded or not self._rows:
            return True
        if self._groups.lacks_memory:
            return False
        length = padded(len(sequence.tokens) + 1)
        rows = len(self._rows) + 1
        share = -(-rows // max(1, self.policy.num_groups(rows)))
        alike = 1 + sum(1 for row in self._rows.values() if 4 * padded(row.num_positions + 1) > 3 * length)
        batch = min(share, alike)
        growth = Charge(1, length + rows * padded(1))
        return self._memory.fits_beside(growth, Charge(batch, batch * length) if batch > 1 else Charge())

    def _preempt_youngest(self) -> bool:
        """Make room: of the lowest priority the row that came last goes back to the head of the queue.

        The last row of all is not preempted: it has grown to all the memory there is, and ends. False without rows.
        """
        if not self._rows:
            return False
        youngest = min(self._rows.values(), key=lambda s: (s.request.priority, -s.id))
        if len(self._rows) == 1:
            self._book.keep_conversation(youngest)
            self._finish(youngest, "length")
            return True
        self._num_preemptions += 1
        self._book.leave(youngest)
        if self._speculation is not None:
            self._speculation.forget(youngest)
        self._detach(youngest)
        youngest.preempt()
        self._waiting.push_front(youngest)
        return True

    # -- microbatches ---------------------------------------------------------------------------------

    def _chunk(self, now: float) -> Microbatch:
        chunk = self._prefill.next_chunk(now)
        self._num_prefilled += len(chunk.tokens)
        microbatch = self._dispatch(
            Kind.PREFILL,
            sequences=chunk.sequences,
            tokens=chunk.tokens,
            lengths=chunk.lengths,
            sample=chunk.last,
            admit=tuple(row_spec(sequence) for sequence in chunk.fresh),
            load=chunk.load,
            chunks=chunk.chunks,
        )
        if chunk.last:
            for sequence in chunk.sequences:
                self._book.keep_prompt(sequence)
        return microbatch

    @property
    def _is_stuck(self) -> bool:
        """Whether rows decode, and only their memory keeps them from it."""
        return not self._in_flight and self._groups.num_rows > 0 and self._held_until is None

    def _is_held(self, now: float, group: Group) -> bool:
        """Whether a row alone waits a moment for a model's draft; the others go on meanwhile."""
        if self._speculation is None or len(group.members) != 1:
            return False
        until = self._speculation.holds(group.members[0], now)
        if until is not None:
            self._held_until = min(until, self._held_until or until)
        return until is not None

    def _step(self, group: Group, now: float) -> Microbatch:
        self._prefill.step_left()
        self._memory.step(group.id, {s.row: s.num_positions + 1 for s in group.members})
        if self._speculation is not None and len(group.members) == 1:
            (sequence,) = group.members
            draft = self._speculation.draft(sequence, crowded=len(self._groups) > 1, now=now)
            if self._memory.is_bounded:  # not into a block of the cache that nobody was asked for
                draft = draft[: padded(sequence.num_positions + 1) - sequence.num_positions - 1]
            if draft:
                block = (sequence.emitted[-1], *draft)
                return self._dispatch(Kind.VERIFY, sequences=(sequence,), tokens=block, sample=True, group=group)
        return self._dispatch(
            Kind.DECODE,
            sequences=tuple(group.members),
            tokens=tuple(s.emitted[-1] for s in group.members),
            sample=True,
            group=group,
        )

    def _dispatch(
        self,
        kind: Kind,
        *,
        sequences: tuple[SequenceState, ...] = (),
        tokens: tuple[int, ...] = (),
        sample: bool = False,
        group: Group | None = None,
        admit: tuple[RowSpec, ...] = (),
        load: tuple[Load, ...] = (),
        lengths: tuple[int, ...] = (),
        chunks: tuple[tuple[int, int], ...] = (),
    ) -> Microbatch:
        store, evict = self._book.take_orders()
        microbatch = Microbatch(
            id=self._next_microbatch,
            kind=kind,
            rows=tuple(s.row for s in sequences),
            tokens=tokens,
            group=group.id if group else 0,
            sample=sample,
            admit=admit,
            release=tuple(self._release),
            lengths=lengths,
            store=store,
            load=load,
            evict=evict,
            trim=tuple(self._trim),
        )
        self._release.clear()
        self._trim.clear()
        self._granted = self.credits
        self._next_microbatch += 1
        self._in_flight[microbatch.id] = InFlight(microbatch, sequences, group, chunks)
        return microbatch

    def _verified(self, sequence: SequenceState, block: Microbatch, drawn: Sequence[Sampled]) -> None:
        """A draft came back: its tokens up to the first that was wrong, and the right one in the place of that."""
        assert self._speculation is not None
        computed = sequence.num_positions + len(block.tokens)
        self._speculation.verified(sequence, len(block.tokens) - 1, len(drawn) - 1)
        for one in drawn:
            if sequence.id not in self._live:
                break  # the draft went beyond its end
            self._draw(sequence, one)
        if sequence.num_positions < computed:
            # With the very next header, so before anything else concerns the row: its store, say, or its release.
            self._trim.append(Trim(sequence.row, sequence.num_positions))

    def _draw(self, sequence: SequenceState, drawn: Sampled) -> None:
        token = Token(sequence.num_emitted, drawn.token_id, drawn.logprob, drawn.top)
        sequence.emitted.append(token.token_id)
        self._effects.append(Drew(sequence.id, token))
        reason: FinishReason | None = None
        if token.token_id in sequence.request.stop_token_ids:
            reason = "stop"
        elif sequence.num_emitted >= sequence.request.max_tokens:
            reason = "length"
        if reason is not None:
            self._book.keep_conversation(sequence)
            self._finish(sequence, reason)

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        self._end(sequence)
        self._effects.append(Ended(sequence.id, reason, sequence.num_emitted, sequence.cached))

    def _end(self, sequence: SequenceState) -> None:
        """Take a sequence out of wherever it is and let its row go with the next microbatch."""
        del self._live[sequence.id]
        if self._speculation is not None:
            self._speculation.forget(sequence)
        if sequence.row < 0:
            self._waiting.remove(sequence.id)
            return
        self._waiting.settle(sequence.request, sequence.request.max_tokens - sequence.num_emitted)
        self._detach(sequence)

    def _detach(self, sequence: SequenceState) -> None:
        """Out of its group or queue, and its row on the way out of the stages."""
        del self._rows[sequence.row]
        self._memory.release(sequence.row)
        if sequence.prefilled > 0:  # the stages know the row only once a chunk went out
            self._release.append(sequence.row)
        if not self._groups.remove(sequence):
            self._prefill.remove(sequence)

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects
