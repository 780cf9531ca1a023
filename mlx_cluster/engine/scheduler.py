"""Decides what the pipeline does next. Pure: no clock, no I/O, no mlx.

Owns: the queue, the rows, the groups, the credits; every decision of a pipeline is made here and nowhere else.
Does not own: streams, deadlines, clients (``engine.engine``).
Invariants: a row is in one group at most; a group has one decode step in flight at most; never more than
``credits`` microbatches in flight; every sequence that was taken ends exactly once.

How a sequence lives: waiting → prefill (in chunks, back to back while nothing decodes) → loose (has a token, waits for
a group at a border) → grouped (decodes) → ended; its row is released with the next microbatch, whatever that is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

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
    SequenceState,
    Started,
)
from mlx_cluster.errors import Overloaded, RowFailed
from mlx_cluster.microbatch import FailedRow, Kind, Load, Microbatch, Report, RowSpec
from mlx_cluster.request import FinishReason, SequenceRequest, Token

# How much of a microbatch of several prompts must not be padding.
MIN_DENSITY = 0.75
# A prompt is cut into so many chunks for each stage that filling and draining the pipeline costs little, but none is
# shorter than this: a chunk reads all weights, however short it is.
CHUNKS_PER_STAGE = 2
MIN_CHUNK = 32


class Scheduler:
    """A state machine: ``submit`` and ``cancel`` sequences, ask ``next`` for work, tell it each ``complete``."""

    def __init__(self, policy: Policy, prefix: PrefixIndex | None = None) -> None:
        self.policy = policy
        self._book = PrefixBook(prefix)
        self._waiting: deque[SequenceState] = deque()
        self._prefilling: deque[SequenceState] = deque()
        self._loose: deque[SequenceState] = deque()
        self._groups: list[Group] = []
        self._ready: deque[Group] = deque()
        self._live: dict[int, SequenceState] = {}
        self._rows: dict[int, SequenceState] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._release: list[int] = []
        self._now = 0.0
        self._effects: list[Effect] = []
        self._next_sequence = 0
        self._next_row = 0
        self._next_microbatch = 0
        self._next_group = 0
        self._decodes_since_refill = 0
        self._prefill_budget = policy.prefill_chunk  # prompt tokens that may still go out in this cycle
        self._granted = 0  # credits when the last microbatch left; groups that end later shrink ``credits``

    # -- from the engine --------------------------------------------------------------------------

    def submit(self, request: SequenceRequest) -> int:
        """Take a sequence; returns its id. Raises ``Overloaded`` when the queue is full.

        Resumed work (``emitted``) goes before new work and past the bound: it was admitted once already.
        """
        resumed = bool(request.emitted)
        if not resumed and self._free_rows() <= 0 and len(self._waiting) >= self.policy.max_queue:
            raise Overloaded(
                f"{len(self._waiting)} sequences are waiting already (scheduler.max_queue is {self.policy.max_queue}); "
                "come back later or raise it",
                retry_after_seconds=2.0,
            )
        sequence = SequenceState(self._next_sequence, request, request.prompt + request.emitted)
        self._next_sequence += 1
        self._live[sequence.id] = sequence
        (self._waiting.appendleft if resumed else self._waiting.append)(sequence)
        return sequence.id

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
        sampled = {s.row: s for s in report.sampled}
        for sequence in done.sequences:
            drawn = sampled.get(sequence.row)
            if drawn is None or sequence.id not in self._live:
                continue
            self._draw(sequence, Token(sequence.num_emitted, drawn.token_id, drawn.logprob, drawn.top))
            if done.microbatch.kind is Kind.PREFILL and sequence.id in self._live:
                self._loose.append(sequence)
        if done.group is not None:
            done.group.in_flight = False
            if done.group in self._groups:
                self._ready.append(done.group)
        return self._take_effects()

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
            self._prefilling.appendleft(sequence)
            restarted += 1
        return restarted

    def next(self, now: float = 0.0) -> Microbatch | None:
        """The next microbatch to send to every stage, or None when nothing may go now."""
        self._now = now
        if len(self._in_flight) >= self.credits:
            return None
        self._admit()
        self._book.plan_stores(now)
        if self._chunk_is_due():
            return self._chunk()
        decode = self._decode()
        if decode is not None:
            return decode
        if (self._release or self._book.has_orders) and not self._in_flight:
            return self._dispatch(Kind.CONTROL)
        return None

    def take_effects(self) -> list[Effect]:
        """Effects of ``next`` and ``fail_rows`` since the last call."""
        return self._take_effects()

    # -- what it may say of itself -----------------------------------------------------------------

    @property
    def credits(self) -> int:
        return max(self.policy.num_stages, len(self._groups)) + 2

    @property
    def num_decoding(self) -> int:
        return len(self._loose) + sum(len(group.members) for group in self._groups)

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
            "prefilling": len(self._prefilling),
            "decoding": self.num_decoding,
            "groups": len(self._groups),
            "rows": len(self._rows),
            "in_flight": len(self._in_flight),
            "prefix_entries": self._book.num_entries,
        }

    def audit(self) -> None:
        """Raise ``AssertionError`` when the books do not balance (called when idle, and by tests after every step)."""
        placed = [*self._prefilling, *self._loose, *(s for g in self._groups for s in g.members)]
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

    # -- admission and prefill ------------------------------------------------------------------------

    def _free_rows(self) -> int:
        return self.policy.max_rows - len(self._rows)

    def _admit(self) -> None:
        while self._waiting and self._free_rows() > 0:
            sequence = self._waiting.popleft()
            self._give_row(sequence)
            self._prefilling.append(sequence)
            self._effects.append(Started(sequence.id))

    def _give_row(self, sequence: SequenceState) -> None:
        sequence.row = self._next_row
        self._next_row += 1
        self._rows[sequence.row] = sequence

    def _chunk_is_due(self) -> bool:
        """While nothing decodes chunks go out back to back; else ``prefill_chunk`` tokens for each cycle of the groups.

        Several short prompts may share a cycle's tokens; a prompt that does not fit what is left waits for the next
        cycle, so that no chunk is cut needlessly small.
        """
        if not self._prefilling:
            return False
        if self.num_decoding == 0 or self._decodes_since_refill >= len(self._groups) + bool(self._loose):
            self._prefill_budget = self.policy.prefill_chunk
            self._decodes_since_refill = 0
        rest = len(self._prefilling[0].tokens) - self._prefilling[0].prefilled
        return self._prefill_budget == self.policy.prefill_chunk or rest <= self._prefill_budget

    def _chunk(self) -> Microbatch:
        sequence = self._prefilling[0]
        loads = self._book.reuse(sequence, self._now)
        start = sequence.prefilled
        limit = self._chunk_limit()
        end = min(start + limit, len(sequence.tokens))
        if start == 0 and end == len(sequence.tokens):
            return self._whole_prompts(limit)
        sequence.prefilled = end
        self._prefill_budget -= end - start
        last = end == len(sequence.tokens)
        if last:
            self._prefilling.popleft()
        fresh = start == (loads[0].length if loads else 0)
        microbatch = self._dispatch(
            Kind.PREFILL,
            sequences=(sequence,),
            tokens=sequence.tokens[start:end],
            sample=last,
            admit=(_row_spec(sequence),) if fresh else (),
            load=loads,
        )
        if last:
            self._book.keep_prompt(sequence)
        return microbatch

    def _chunk_limit(self) -> int:
        """Tokens of one microbatch: so few that all stages get to work on what waits."""
        if self.policy.num_stages == 1:
            return self.policy.prefill_chunk
        waiting = sum(len(sequence.tokens) - sequence.cached for sequence in self._prefilling)
        overlapping = math.ceil(waiting / (CHUNKS_PER_STAGE * self.policy.num_stages))
        return min(self.policy.prefill_chunk, max(MIN_CHUNK, overlapping))

    def _whole_prompts(self, limit: int) -> Microbatch:
        """One microbatch of the first prompt and those behind it that fit beside it without much padding."""
        taken = [self._prefilling.popleft()]
        longest = total = len(taken[0].tokens)
        while self._prefilling and len(taken) < self.policy.max_prompts:
            sequence = self._prefilling[0]
            length = len(sequence.tokens)
            longest, total = max(longest, length), total + length
            padded = longest * (len(taken) + 1)
            if sequence.prefilled or padded > limit or total < MIN_DENSITY * padded:
                break
            if self._book.can_reuse(sequence, self._now):
                break
            taken.append(self._prefilling.popleft())
        for sequence in taken:
            sequence.prefilled = len(sequence.tokens)
            self._prefill_budget -= len(sequence.tokens)
        microbatch = self._dispatch(
            Kind.PREFILL,
            sequences=tuple(taken),
            tokens=tuple(token for sequence in taken for token in sequence.tokens),
            lengths=tuple(len(sequence.tokens) for sequence in taken) if len(taken) > 1 else (),
            sample=True,
            admit=tuple(_row_spec(sequence) for sequence in taken),
        )
        for sequence in taken:
            self._book.keep_prompt(sequence)
        return microbatch

    # -- decode ---------------------------------------------------------------------------------------

    def _decode(self) -> Microbatch | None:
        target = self.policy.num_groups(self.num_decoding) if self.num_decoding else 0
        while self._ready:
            group = self._ready.popleft()
            if len(self._groups) > target:
                self._dissolve(group)
                continue
            self._balance(group, target)
            return self._step(group)
        if self._loose and len(self._groups) < target:
            group = Group(self._next_group)
            self._next_group += 1
            self._groups.append(group)
            self._balance(group, target)
            return self._step(group)
        return None

    def _dissolve(self, group: Group) -> None:
        for sequence in group.members:
            sequence.group = None
        self._loose.extend(group.members)
        self._groups.remove(group)

    def _balance(self, group: Group, target: int) -> None:
        """Bring a group that is at a border to its fair share: loose rows join, too many leave.

        A row leaves only when that evens out a difference of two or more, as every move copies its cache.
        """
        share = math.ceil(self.num_decoding / target)
        while self._loose and len(group.members) < share:
            sequence = self._loose.popleft()
            sequence.group = group
            group.members.append(sequence)
        others = [len(other.members) for other in self._groups if other is not group]
        while len(group.members) > share and (len(self._groups) < target or min(others) < len(group.members) - 1):
            sequence = group.members.pop()
            sequence.group = None
            self._loose.append(sequence)

    def _step(self, group: Group) -> Microbatch:
        group.in_flight = True
        self._decodes_since_refill += 1
        return self._dispatch(
            Kind.DECODE,
            sequences=tuple(group.members),
            tokens=tuple(s.emitted[-1] for s in group.members),
            sample=True,
            group=group,
        )

    # -- shared ---------------------------------------------------------------------------------------

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
        )
        self._release.clear()
        self._granted = self.credits
        self._next_microbatch += 1
        self._in_flight[microbatch.id] = InFlight(microbatch, sequences, group)
        return microbatch

    def _draw(self, sequence: SequenceState, token: Token) -> None:
        sequence.emitted.append(token.token_id)
        self._effects.append(Drew(sequence.id, token))
        reason: FinishReason | None = None
        if token.token_id in sequence.request.stop_token_ids:
            reason = "stop"
        elif sequence.num_emitted >= sequence.request.max_tokens:
            reason = "length"
        if reason is not None:
            self._book.keep_conversation(sequence)
            self._end(sequence)
            self._effects.append(Ended(sequence.id, reason, sequence.num_emitted, sequence.cached))

    def _end(self, sequence: SequenceState) -> None:
        """Take a sequence out of wherever it is and let its row go with the next microbatch."""
        del self._live[sequence.id]
        if sequence.row < 0:
            self._waiting.remove(sequence)
            return
        self._detach(sequence)

    def _detach(self, sequence: SequenceState) -> None:
        """Out of its group or queue, and its row on the way out of the stages."""
        del self._rows[sequence.row]
        if sequence.prefilled > 0:  # the stages know the row only once a chunk went out
            self._release.append(sequence.row)
        if sequence.group is not None:
            group = sequence.group
            group.members.remove(sequence)
            if not group.members:
                self._groups.remove(group)
                if group in self._ready:
                    self._ready.remove(group)
        elif sequence in self._loose:
            self._loose.remove(sequence)
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects


def _row_spec(sequence: SequenceState) -> RowSpec:
    request = sequence.request
    history = sequence.tokens if request.sampling.needs_history else request.emitted if request.grammar else ()
    return RowSpec(
        row=sequence.row,
        sampling=request.sampling,
        choice=request.choice,
        first_index=len(request.emitted),
        prompt_length=len(request.prompt) if request.sampling.needs_history else 0,
        history=history,
        grammar=request.grammar,
        stop_token_ids=tuple(sorted(request.stop_token_ids)) if request.grammar else (),
    )
