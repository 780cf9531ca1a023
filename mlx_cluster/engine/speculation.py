"""Drafts of what a row will say next, and whether trying them pays. Pure.

Owns: prompt lookup (a row's text often repeats itself: what followed the same few tokens before is the draft), the
measured cost of verification blocks, and the judgement of how long a draft is worth its block.
Does not own: the blocks themselves (``engine.scheduler``); how a stage verifies one (``model.runner``). A draft decides
only how fast tokens come, never which: the last stage draws every token with the key of its index.
Invariants: work per token does not grow with the text; under ``auto`` a row never loses more than ``GRACE_STEPS`` and
``PROBE_SHARE`` of its steps to drafts that did not come true.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, Protocol

from mlx_cluster.engine.sequence import SequenceState

Mode = Literal["auto", "off", "on"]

# A long prompt is indexed over its first steps, so many tokens at each, and not in one stroke.
INDEX_TOKENS_PER_STEP = 1024
# Steps that a row may lose to probing: some at once, and a share of all.
GRACE_STEPS = 1.0
PROBE_SHARE = 0.02
PROBE_EVERY_STEPS = 16
# A draft must promise this much more than a plain step; less is within the noise of what is measured.
MIN_GAIN = 1.05
# What acceptance is taken for before anything was tried, and how many tries that counts for.
_PRIOR_ACCEPTANCE = 0.7
_PRIOR_WEIGHT = 2.0
_FORGET = 0.9  # older tries count less: texts change
_SAMPLES = 9  # a median of these forgets a hiccup at once
_UNMEASURED_SLOPE = 0.05  # until a block was measured, what each further position adds to a step
_MOST_EARLIER_GAIN = 2.0  # steps: what was won before pays for little of what is lost now


@dataclass(frozen=True, slots=True)
class Bounds:
    """``max_draft`` tokens at most are drafted, behind ``min_match`` that the text had before.

    A step waits ``wait_seconds`` at most for the draft of a model.
    """

    mode: Mode = "auto"
    max_draft: int = 8
    min_match: int = 3
    wait_seconds: float = 0.02


class Lookup:
    """Finds where a growing text had its last few tokens before."""

    def __init__(self, min_match: int) -> None:
        self._min_match = min_match
        self._text: list[int] = []
        self._after: dict[int, int] = {}  # hash of ``min_match`` tokens → where the text goes on behind the latest such
        self._num_indexed = 0  # tokens whose place as an end of such is in ``_after``
        self._source = 0  # where the last draft came from …
        self._length_then = 0  # … and how long the text was

    def extend(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """The text is ``prompt`` and ``output``, of which a part is known already. Indexes a bounded share of it."""
        known = len(self._text)
        if known < len(prompt):
            self._text += prompt[known:]
            known = len(prompt)
        self._text += output[known - len(prompt) :]
        # The very last token's place would only find itself.
        end = min(len(self._text), self._num_indexed + 1 + INDEX_TOKENS_PER_STEP)
        for at in range(max(self._num_indexed + 1, self._min_match), end):
            self._after[self._key(at)] = at
        self._num_indexed = max(self._num_indexed, end - 1)

    def draft(self, most: int) -> tuple[int, ...]:
        """What followed the last tokens the time before; a text that runs into its own end goes round."""
        source = self._find()
        if source is None:
            return ()
        self._source, self._length_then = source, len(self._text)
        period = len(self._text) - source
        return tuple(self._text[source + at % period] for at in range(most))

    def _find(self) -> int | None:
        # Where the last draft came from goes on to match longer than any other place is known to.
        follow = self._source + len(self._text) - self._length_then
        if self._source and self._matches(follow):
            return follow
        found = self._after.get(self._key(len(self._text)))
        return found if found is not None and self._matches(found) else None

    def _matches(self, at: int) -> bool:
        n = self._min_match
        return n <= at < len(self._text) and self._text[at - n : at] == self._text[-n:]

    def _key(self, end: int) -> int:
        return hash(tuple(self._text[end - self._min_match : end]))


class BlockCosts:
    """Measured seconds of blocks of one row, by stage and positions; a plain step of one row is a block of one."""

    def __init__(self, num_stages: int, hop_seconds: Callable[[], float]) -> None:
        self._samples: list[dict[int, deque[float]]] = [{} for _ in range(num_stages)]
        self._hop_seconds = hop_seconds

    def observe(self, stage: int, positions: int, seconds: float) -> None:
        self._samples[stage].setdefault(positions, deque(maxlen=_SAMPLES)).append(seconds)

    @property
    def step_seconds(self) -> float:
        """What a plain step of one row takes on its way through all stages."""
        hops = len(self._samples) * self._hop_seconds()
        return max(1e-6, sum(self._seconds(stage, 1) for stage in self._samples) + hops)

    def relative(self, positions: int, *, crowded: bool) -> float:
        """What a block costs in plain steps of one row.

        A row alone waits for the whole way through the stages; where others share the pipeline, what counts is how long
        the slowest stage is busy with it.
        """
        plain = [self._seconds(stage, 1) for stage in self._samples]
        block = [self._seconds(stage, positions) for stage in self._samples]
        if crowded:
            return max(block) / max(plain) if max(plain) > 0 else 1.0
        hops = len(self._samples) * self._hop_seconds()
        return (sum(block) + hops) / (sum(plain) + hops)

    def _seconds(self, stage: dict[int, deque[float]], positions: int) -> float:
        """The median of what was measured, or what lies on the line through the sizes next to it."""
        if positions in stage:
            return median(stage[positions])
        sizes = sorted(stage)
        if not sizes:
            return 1.0 + _UNMEASURED_SLOPE * positions  # nothing is known: any unit will do
        if len(sizes) == 1:
            (size,) = sizes
            rate = 1.0 + _UNMEASURED_SLOPE * (positions - 1)
            return median(stage[size]) * rate / (1.0 + _UNMEASURED_SLOPE * (size - 1))
        above = next((at for at, size in enumerate(sizes) if size > positions), len(sizes) - 1)
        low, high = sizes[max(above, 1) - 1], sizes[max(above, 1)]
        first, second = median(stage[low]), median(stage[high])
        slope = max(0.0, (second - first) / (high - low))
        return max(0.0, first + slope * (positions - low))


@dataclass(slots=True)
class Tally:
    """How often one source's drafts of a row came true lately."""

    right: float = 0.0
    wrong: float = 0.0

    @property
    def acceptance(self) -> float:
        """The chance that a drafted token is the next, given that those before it were."""
        tried = self.right + self.wrong + _PRIOR_WEIGHT
        return (self.right + _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT) / tried

    def count(self, num_accepted: int, *, all_of_it: bool) -> None:
        self.right = self.right * _FORGET + num_accepted
        self.wrong = self.wrong * _FORGET + (not all_of_it)


@dataclass(slots=True)
class Drafting:
    """What is known of one row's drafts. ``owed`` are the steps that drafts have cost it more than they saved."""

    lookup: Lookup
    by_lookup: Tally = field(default_factory=Tally)
    by_model: Tally = field(default_factory=Tally)
    tried: Tally | None = None  # whose draft is in the block in flight …
    cost: float = 1.0  # … and what that costs, in steps
    owed: float = 0.0
    steps: int = 0
    last_block: int = -PROBE_EVERY_STEPS
    held_since: float | None = None  # since when its step waits for a model's draft


class Drafts(Protocol):
    """Another source of drafts: a smaller model (``engine.draft_model``). Its answers come when they come."""

    def follow(self, sequence: int, prompt: Sequence[int], output: Sequence[int], most: int) -> None: ...

    def draft(self, sequence: int, most: int) -> tuple[int, ...]: ...

    def is_close(self, sequence: int, most: int) -> bool: ...

    def forget(self, sequence: int) -> None: ...


@dataclass(slots=True)
class Speculation:
    """Decides for each step of a row that decodes alone whether it tries a draft, and which."""

    bounds: Bounds
    costs: BlockCosts
    model: Drafts | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    num_blocks: int = 0
    _rows: dict[int, Drafting] = field(default_factory=dict)  # by sequence

    def wants(self, sequence: SequenceState) -> bool:
        return self.bounds.mode != "off" and sequence.request.speculate is not False

    def holds(self, sequence: SequenceState, now: float) -> float | None:
        """Until when the sequence's next step waits for a model's draft, if it does; tells the model its text."""
        most = self._most(sequence)
        if self.model is None or most < 1 or not self.wants(sequence):
            return None
        row = self._row(sequence)
        self.model.follow(sequence.id, sequence.tokens, sequence.emitted, most)
        if not self._forced(sequence) and (self._owes_too_much(row) or not self._pays(row.by_model, most)):
            return None
        if not self.model.is_close(sequence.id, most):
            return None
        if row.held_since is None:
            row.held_since = now
        until = row.held_since + self.bounds.wait_seconds
        return until if now < until else None

    def draft(self, sequence: SequenceState, *, crowded: bool, now: float = 0.0) -> tuple[int, ...]:
        """The tokens to try behind the sequence's last one; none for a plain step. Counts the step."""
        most = self._most(sequence)
        if not self.wants(sequence) or most < 1:
            return ()
        row = self._row(sequence)
        row.steps += 1
        row.lookup.extend(sequence.tokens, sequence.emitted)
        if row.held_since is not None:
            row.owed += (now - row.held_since) / self.costs.step_seconds
            row.held_since = None
        sources = [(row.by_lookup, row.lookup.draft(most))]
        if self.model is not None:
            sources.append((row.by_model, self.model.draft(sequence.id, most)))
        drafts = [(tally, _until(draft, sequence.request.stop_token_ids)) for tally, draft in sources]
        tally, draft = self._best(row, drafts, forced=self._forced(sequence), crowded=crowded)
        if draft:
            row.tried, row.last_block = tally, row.steps
            row.cost = self.costs.relative(1 + len(draft), crowded=crowded)
        return draft

    def verified(self, sequence: SequenceState, num_drafted: int, num_accepted: int) -> None:
        """How far a draft came true."""
        self.num_blocks += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        row = self._rows.get(sequence.id)
        if row is None:
            return
        if row.tried is not None:
            row.tried.count(num_accepted, all_of_it=num_accepted == num_drafted)
        row.owed = max(row.owed + row.cost - 1 - num_accepted, -_MOST_EARLIER_GAIN)

    def forget(self, sequence: SequenceState) -> None:
        self._rows.pop(sequence.id, None)
        if self.model is not None:
            self.model.forget(sequence.id)

    def statistics(self) -> dict[str, int]:
        return {
            "drafted_tokens": self.num_drafted,
            "accepted_tokens": self.num_accepted,
            "verified_blocks": self.num_blocks,
        }

    def _most(self, sequence: SequenceState) -> int:
        """How long a draft may be: the last token that is asked for comes without one."""
        return min(self.bounds.max_draft, sequence.request.max_tokens - sequence.num_emitted - 1)

    def _row(self, sequence: SequenceState) -> Drafting:
        row = self._rows.get(sequence.id)
        if row is None:
            row = self._rows[sequence.id] = Drafting(Lookup(self.bounds.min_match))
        return row

    def _owes_too_much(self, row: Drafting) -> bool:
        return row.owed > GRACE_STEPS + PROBE_SHARE * row.steps

    def _forced(self, sequence: SequenceState) -> bool:
        return self.bounds.mode == "on" or sequence.request.speculate is True

    def _pays(self, tally: Tally, length: int) -> bool:
        return self._gain(tally, length, crowded=False)[1] > MIN_GAIN

    def _best(
        self, row: Drafting, drafts: Sequence[tuple[Tally, tuple[int, ...]]], *, forced: bool, crowded: bool
    ) -> tuple[Tally, tuple[int, ...]]:
        """The draft that promises most, as long as is best; where none pays, now and then a probe of one token."""
        none: tuple[Tally, tuple[int, ...]] = (row.by_lookup, ())
        drafts = [(tally, draft) for tally, draft in drafts if draft]
        if not drafts or (not forced and self._owes_too_much(row)):
            return none
        chosen, best = none, 0.0 if forced else MIN_GAIN
        for tally, draft in drafts:
            length, gain = self._gain(tally, len(draft), crowded=crowded)
            if gain > best:
                chosen, best = (tally, draft[:length]), gain
        if not chosen[1] and row.steps - row.last_block >= PROBE_EVERY_STEPS:
            tally, draft = min(drafts, key=lambda each: each[0].right + each[0].wrong)
            return tally, draft[:1]
        return chosen

    def _gain(self, tally: Tally, available: int, *, crowded: bool) -> tuple[int, float]:
        """How many of so many drafted tokens are best tried, and how many tokens that promises for a step's time."""
        best, best_gain = 0, 0.0
        promised, chance = 1.0, 1.0
        for length in range(1, available + 1):
            chance *= tally.acceptance
            promised += chance
            gain = promised / self.costs.relative(1 + length, crowded=crowded)
            if gain > best_gain:
                best, best_gain = length, gain
        return best, best_gain


def _until(draft: tuple[int, ...], stops: AbstractSet[int]) -> tuple[int, ...]:
    """The draft before its first stop token: nothing comes behind one, and it is drawn without a draft as well."""
    return next((draft[:at] for at, token in enumerate(draft) if token in stops), draft)
