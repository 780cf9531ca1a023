"""Microbatches that were dispatched to the device: what a waiting thread holds.

Owns: waiting for arrays and reading them into an ``Outcome``.
Invariant: nothing here adds to a graph. Reading the buffer or the values of an array that went through ``async_eval``
waits until it is computed, from any thread, and lets other Python threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_cluster.microbatch import FailedRow, Frame, Outcome, Pending, Sampled
from mlx_cluster.model import state
from mlx_cluster.model.sampling import Drawn


@dataclass(frozen=True, slots=True)
class Finished:
    outcome: Outcome

    def wait(self) -> Outcome:
        return self.outcome


@dataclass(frozen=True, slots=True)
class Incomplete:
    """A microbatch without some rows, whose entry of the prefix cache was not here."""

    pending: Pending
    missing: tuple[int, ...]

    def wait(self) -> Outcome:
        return replace(self.pending.wait(), missing=self.missing)


@dataclass(frozen=True, slots=True)
class PendingFrame:
    """On the way to the next slice."""

    frame: Frame
    rows: tuple[int, ...]
    failed: tuple[FailedRow, ...]

    def wait(self) -> Outcome:
        try:
            memoryview(self.frame.payload).release()
        except RuntimeError as error:
            zeros = state.zero_frame(self.frame.microbatch_id, self.frame.tensors)
            return Outcome(zeros, failed=_all_failed(self.rows, error))
        return Outcome(self.frame, failed=self.failed)


@dataclass(frozen=True, slots=True)
class PendingFill:
    """A chunk on the last slice that only fills caches."""

    filled: Any  # mlx arrays have the buffer protocol, which their types do not tell
    rows: tuple[int, ...]
    failed: tuple[FailedRow, ...]

    def wait(self) -> Outcome:
        try:
            memoryview(self.filled).release()
        except RuntimeError as error:
            return Outcome(failed=_all_failed(self.rows, error))
        return Outcome(failed=self.failed)


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens on the last slice. ``wanted`` says per row how many alternatives it asked for, or None."""

    drawn: Drawn
    rows: Sequence[int]
    wanted: Sequence[int | None]
    failed: tuple[FailedRow, ...]

    def wait(self) -> Outcome:
        try:
            sampled = self._read()
        except RuntimeError as error:
            failed = _all_failed(self.rows, error)
            return Outcome(failed=failed + self.failed)
        if self.failed:
            refused = {failure.row for failure in self.failed}  # drawn with the others, but of no meaning
            sampled = [drawn for drawn in sampled if drawn.row not in refused]
        return Outcome(sampled=tuple(sampled), failed=self.failed)

    def _read(self) -> list[Sampled]:
        tokens: Any = self.drawn.tokens.tolist()
        if self.drawn.logprobs is None or self.drawn.top_ids is None or self.drawn.top_logprobs is None:
            return [Sampled(row, token) for row, token in zip(self.rows, tokens, strict=True)]
        logprobs: Any = self.drawn.logprobs.tolist()
        ids: Any = self.drawn.top_ids.tolist()
        values: Any = self.drawn.top_logprobs.tolist()
        return [
            Sampled(row, tokens[i])
            if count is None
            else Sampled(row, tokens[i], logprobs[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
            for i, (row, count) in enumerate(zip(self.rows, self.wanted, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class PendingBlocks:
    """Verification blocks on the last slice. ``tokens`` has a line for each position of each row.

    ``drafts`` are those of the rows; ``usable`` says how many of a row's lines may count at all.
    """

    tokens: PendingTokens
    drafts: Mapping[int, tuple[int, ...]]
    usable: Mapping[int, int]

    def wait(self) -> Outcome:
        outcome = self.tokens.wait()
        lines: dict[int, list[Sampled]] = {row: [] for row in self.drafts}
        for line in outcome.sampled:
            lines[line.row].append(line)
        verified = (line for row, mine in lines.items() for line in self._verified(row, mine))
        return replace(outcome, sampled=tuple(verified))

    def _verified(self, row: int, lines: Sequence[Sampled]) -> Sequence[Sampled]:
        """Up to and including the first that the draft does not have."""
        for index, (line, guess) in enumerate(zip(lines, self.drafts[row], strict=False)):
            if line.token_id != guess:
                return lines[: min(index + 1, self.usable[row])]
        return lines[: self.usable[row]]


def _all_failed(rows: Sequence[int], error: Exception) -> tuple[FailedRow, ...]:
    message = f"the computation of this microbatch failed: {error}"
    return tuple(FailedRow(row, message) for row in dict.fromkeys(rows))  # a verification block names a row repeatedly
