"""What is read off a prompt's own positions: log probabilities of its tokens, or its state as one vector.

Owns: both computations, and waiting for them. Pure but for a row's running sum.
Does not own: the forward pass (``model.runner``), the log probabilities of drawn tokens (``model.sampling``).
Invariant: nothing in a ``wait`` adds to a graph; what is read does not depend on how the prompt was cut into chunks,
but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_cluster.microbatch import FailedRow, Outcome, Pending, PooledRow, RowSpec, ScoredToken
from mlx_cluster.model.sampling import Drawn, with_logprobs
from mlx_cluster.model.slice import Head


def head_for(spec: RowSpec, head: Head) -> tuple[Head, bool]:
    """What a slice must give for such a row, and whether it is the state instead of logits."""
    if spec.pool is not None:
        return ("all" if spec.pool == "mean" else head), True
    return ("all" if spec.prompt_logprobs is not None else head), False


def targets(spec: RowSpec, start: int, count: int) -> tuple[int, ...]:
    """The tokens of the prompt that the positions from ``start`` on predict."""
    return spec.history[start + 1 : min(start + 1 + count, spec.prompt_length)]


def score(logits: mx.array, tokens: Sequence[int]) -> Drawn:
    """The log probabilities of ``tokens`` at the first positions of ``logits`` (positions, vocabulary)."""
    return with_logprobs(logits[: len(tokens)].astype(mx.float32), mx.array(list(tokens)))


def unit_vector(total: mx.array) -> mx.array:
    """Scaled to length 1, as whoever compares vectors by their angle expects it."""
    return total / mx.maximum(mx.linalg.norm(total), 1e-12)


@dataclass(frozen=True, slots=True)
class PendingScores:
    """A chunk whose tokens are scored: what ``inner`` gives, and the scores of the tokens behind its positions."""

    inner: Pending
    row: int
    first: int  # the prompt's position of the first of ``tokens``
    tokens: Sequence[int]
    scores: Drawn
    num_top: int

    def wait(self) -> Outcome:
        outcome = self.inner.wait()
        if any(failure.row == self.row for failure in outcome.failed):
            return outcome
        values: list[Any] = [array.tolist() for array in self.scores.arrays()[1:]]
        logprobs, ids, tops = values
        scored = tuple(
            ScoredToken(
                self.row,
                self.first + at,
                token,
                logprobs[at],
                tuple(zip(ids[at][: self.num_top], tops[at][: self.num_top], strict=True)),
            )
            for at, token in enumerate(self.tokens)
        )
        return replace(outcome, scored=scored)


@dataclass(frozen=True, slots=True)
class PendingPool:
    """The vector of a whole prompt."""

    vector: mx.array
    row: int
    failed: tuple[FailedRow, ...]

    def wait(self) -> Outcome:
        try:
            values: Any = self.vector.tolist()
        except RuntimeError as error:
            return Outcome(failed=(FailedRow(self.row, f"the computation of this prompt failed: {error}"),))
        return Outcome(pooled=(PooledRow(self.row, tuple(values)),), failed=self.failed)
