"""The prompts that are being computed: whose chunk goes next, how long it is, and which short prompts share one.

Owns: the queue of admitted prompts, the length of chunks and how much of a cycle prefill may take.
Does not own: microbatches (``engine.scheduler``), prefix entries (``engine.prefix_book``).
Invariant: a prompt's chunks leave in order; with its last one it leaves the queue.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_cluster.engine.prefix_book import PrefixBook
from mlx_cluster.engine.sequence import Policy, SequenceState
from mlx_cluster.microbatch import Load

# How much of a microbatch of several prompts must not be padding.
MIN_DENSITY = 0.75
# A prompt is cut into so many chunks for each stage that filling and draining the pipeline costs little, but none is
# shorter than this: a chunk reads all weights, however short it is.
CHUNKS_PER_STAGE = 2
MIN_CHUNK = 32
# Where something is read off every position the last stage holds all their logits: 80 MB for a vocabulary of 152k.
READ_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a prefill microbatch carries. ``fresh`` are the rows that begin with it, ``last`` says the prompts end."""

    sequences: tuple[SequenceState, ...]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    fresh: tuple[SequenceState, ...] = ()
    last: bool = False
    load: tuple[Load, ...] = ()


class Prefill:
    def __init__(self, policy: Policy, book: PrefixBook) -> None:
        self._policy, self._book = policy, book
        self._queue: deque[SequenceState] = deque()
        self._steps_since_refill = 0
        self._budget = policy.prefill_chunk  # prompt tokens that may still go out in this cycle

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

    def step_left(self) -> None:
        """A decode step went out: prefill's next turn comes nearer."""
        self._steps_since_refill += 1

    def is_due(self, steps_per_cycle: int) -> bool:
        """While nothing decodes chunks go out back to back; else ``prefill_chunk`` tokens for each cycle of the groups.

        Several short prompts may share a cycle's tokens; a prompt that does not fit what is left waits for the next
        cycle, so that no chunk is cut needlessly small.
        """
        if not self._queue:
            return False
        if self._steps_since_refill >= steps_per_cycle:
            self._budget = self._policy.prefill_chunk
            self._steps_since_refill = 0
        rest = len(self._queue[0].tokens) - self._queue[0].prefilled
        return self._budget == self._policy.prefill_chunk or rest <= self._budget

    def next_chunk(self, now: float) -> Chunk:
        """What goes out when prefill is due."""
        sequence = self._queue[0]
        loads = self._book.reuse(sequence, now)
        start = sequence.prefilled
        limit = min(self._limit(), READ_CHUNK) if sequence.request.reads_prompt else self._limit()
        end = min(start + limit, len(sequence.tokens))
        if start == 0 and end == len(sequence.tokens):
            return self._whole_prompts(limit, now)
        sequence.prefilled = end
        self._budget -= end - start
        last = end == len(sequence.tokens)
        if last:
            self._queue.popleft()
        begins = start == (loads[0].length if loads else 0)
        tokens = sequence.tokens[start:end]
        return Chunk((sequence,), tokens, fresh=(sequence,) if begins else (), last=last, load=loads)

    def _limit(self) -> int:
        """Tokens of one microbatch: so few that all stages get to work on what waits."""
        if self._policy.num_stages == 1:
            return self._policy.prefill_chunk
        waiting = sum(len(sequence.tokens) - sequence.cached for sequence in self._queue)
        overlapping = math.ceil(waiting / (CHUNKS_PER_STAGE * self._policy.num_stages))
        return min(self._policy.prefill_chunk, max(MIN_CHUNK, overlapping))

    def _whole_prompts(self, limit: int, now: float) -> Chunk:
        """One microbatch of the first prompt and those behind it that fit beside it without much padding."""
        taken = [self._queue.popleft()]
        longest = total = len(taken[0].tokens)
        while self._queue and len(taken) < self._policy.max_prompts:
            sequence = self._queue[0]
            if sequence.request.reads_prompt or taken[0].request.reads_prompt:
                break
            length = len(sequence.tokens)
            longest, total = max(longest, length), total + length
            padded = longest * (len(taken) + 1)
            if sequence.prefilled or padded > limit or total < MIN_DENSITY * padded:
                break
            if self._book.num_reusable(sequence, now):
                break
            taken.append(self._queue.popleft())
        for sequence in taken:
            sequence.prefilled = len(sequence.tokens)
            self._budget -= len(sequence.tokens)
        return Chunk(
            tuple(taken),
            tuple(token for sequence in taken for token in sequence.tokens),
            lengths=tuple(len(sequence.tokens) for sequence in taken) if len(taken) > 1 else (),
            fresh=tuple(taken),
            last=True,
        )
