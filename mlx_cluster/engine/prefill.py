"""The prompts that are being computed: whose chunk goes next, how long it is, and which short prompts share one.

Owns: the queue of admitted prompts, fairness between them, and how much of a cycle prefill may take.
Does not own: microbatches (``engine.scheduler``), chunk times (``engine.chunking``), prefix entries
(``engine.prefix_book``).
Invariants: a prompt's chunks leave in order, and with its last one it leaves the queue; of any ``AGEING_TURNS`` chunks
one is the oldest prompt's, so a long prompt ends however many short ones come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlx_cluster.engine.chunking import (
    ChunkTimes,
    Pace,
    considerate_length,
    in_equal_pieces,
    overlapping_length,
)
from mlx_cluster.engine.prefix_book import PrefixBook
from mlx_cluster.engine.sequence import Policy, SequenceState
from mlx_cluster.microbatch import Load

# How much of a microbatch of several prompts must not be padding.
MIN_DENSITY = 0.75
# The shortest rest goes first (the first token of a short prompt does not wait for a long one), but one turn of so many
# is the oldest prompt's.
AGEING_TURNS = 4
# Where something is read off every position the last stage holds all their logits: 80 MB for a vocabulary of 152k.
READ_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a prefill microbatch carries. ``fresh`` are the rows that begin with it, ``last`` says the prompts end.

    ``chunks`` are the (position, length) of each row as the stages compute it, padded to the longest.
    """

    sequences: tuple[SequenceState, ...]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    fresh: tuple[SequenceState, ...] = ()
    last: bool = False
    load: tuple[Load, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()


class Prefill:
    """``pace`` tells what decodes, None where that was not measured; it is asked once in a cycle."""

    def __init__(self, policy: Policy, book: PrefixBook, pace: Callable[[], Pace | None]) -> None:
        self._policy, self._book, self._pace = policy, book, pace
        self._times = policy.chunk_times or ChunkTimes(policy.num_stages)
        self._queue: deque[SequenceState] = deque()
        self._turns = 0
        self._steps_since_refill = 0
        self._alone = True  # nothing decodes
        self._seconds_since_refill = self._seconds_before = 0.0  # of chunks in this cycle, and in the one before
        self._allowance: int | None = None  # prompt tokens for this cycle; None until a prompt asks
        self._spent = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._queue)

    def add(self, sequence: SequenceState) -> None:
        self._queue.append(sequence)

    def add_first(self, sequence: SequenceState) -> None:
        """A prompt that lost its place without fault of its own."""
        self._queue.appendleft(sequence)

    def remove(self, sequence: SequenceState) -> bool:
        """False when it is not here."""
        if sequence not in self._queue:
            return False
        self._queue.remove(sequence)
        return True

    # -- when -----------------------------------------------------------------------------------------

    def step_left(self) -> None:
        """A decode step went out: prefill's next turn comes nearer."""
        self._steps_since_refill += 1

    def is_due(self, steps_per_cycle: int) -> bool:
        """While nothing decodes chunks go out back to back; else a budget for each cycle of the groups.

        Several short prompts may share a cycle's budget; a prompt that does not fit what is left waits for the next
        cycle, so that no chunk is cut needlessly small.
        """
        self._alone = steps_per_cycle == 0
        if self._steps_since_refill >= steps_per_cycle:
            self._seconds_before, self._seconds_since_refill = self._seconds_since_refill, 0.0
            self._steps_since_refill = self._spent = 0
            self._allowance = None
        if not self._queue:
            return False
        if self._spent == 0:
            return True
        assert self._allowance is not None, "what was spent was allowed"
        return _rest(self._next()) <= self._allowance - self._spent

    # -- what -----------------------------------------------------------------------------------------

    def next_chunk(self, now: float) -> Chunk:
        """What goes out when prefill is due."""
        sequence = self._next()
        self._turns += 1
        loads = self._book.reuse(sequence, now)
        start = sequence.prefilled
        limit = self._limit(sequence)
        if start == 0 and len(sequence.tokens) <= limit:
            return self._whole_prompts(sequence, limit, now)
        end = start + in_equal_pieces(_rest(sequence), limit)
        sequence.prefilled = end
        self._spend(start, end - start)
        last = end == len(sequence.tokens)
        if last:
            self._queue.remove(sequence)
        begins = start == (loads[0].length if loads else 0)
        tokens = sequence.tokens[start:end]
        fresh = (sequence,) if begins else ()
        return Chunk((sequence,), tokens, fresh=fresh, last=last, load=loads, chunks=((start, end - start),))

    def _next(self) -> SequenceState:
        """The prompt with the shortest rest, and the oldest one in every so many turns."""
        if self._turns % AGEING_TURNS == AGEING_TURNS - 1:
            return self._queue[0]
        return min(self._queue, key=_rest)

    def _limit(self, sequence: SequenceState) -> int:
        """Tokens of the next microbatch."""
        if self._allowance is None:
            wanted = self._wanted(sequence)
            self._allowance = min(self._policy.prefill_chunk, max(self._policy.min_chunk, wanted))
        left = max(1, self._allowance - self._spent)
        return min(left, READ_CHUNK) if sequence.request.reads_prompt else left

    def _spend(self, position: int, length: int) -> None:
        self._spent += length
        if not self._alone:
            self._seconds_since_refill += self._times.seconds(position, length)

    def _wanted(self, sequence: SequenceState) -> int:
        times, num_stages = self._times, self._policy.num_stages
        pace = None if self._alone or not times.is_measured else self._pace()
        if pace is not None:
            return considerate_length(times, num_stages, sequence.prefilled, pace, self._seconds_before)
        if num_stages == 1:
            return self._policy.prefill_chunk
        backlog = sum(len(each.tokens) - each.cached for each in self._queue)
        end = len(sequence.tokens)
        return overlapping_length(times, num_stages, sequence.prefilled, sequence.cached, end, backlog)

    def _whole_prompts(self, first: SequenceState, limit: int, now: float) -> Chunk:
        """One microbatch of the prompt and the shortest others, as many as fit beside it without much padding."""
        taken = [first]
        longest = total = len(first.tokens)
        if self._policy.max_prompts > 1 and not first.request.reads_prompt:
            others = (s for s in self._queue if s is not first and not s.prefilled and not s.request.reads_prompt)
            for sequence in sorted(others, key=_rest):
                length = len(sequence.tokens)
                longest, total = max(longest, length), total + length
                padded = longest * (len(taken) + 1)
                if len(taken) == self._policy.max_prompts or padded > limit or total < MIN_DENSITY * padded:
                    break
                if self._book.num_reusable(sequence, now):
                    break
                taken.append(sequence)
        for sequence in taken:
            self._queue.remove(sequence)
            sequence.prefilled = len(sequence.tokens)
            self._spend(0, len(sequence.tokens))
        return Chunk(
            tuple(taken),
            tuple(token for sequence in taken for token in sequence.tokens),
            lengths=tuple(len(sequence.tokens) for sequence in taken) if len(taken) > 1 else (),
            fresh=tuple(taken),
            last=True,
            chunks=((0, max(len(sequence.tokens) for sequence in taken)),) * len(taken),
        )


def _rest(sequence: SequenceState) -> int:
    return len(sequence.tokens) - sequence.prefilled
