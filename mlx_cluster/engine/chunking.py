"""How long a chunk of a prompt should be. Pure.

Owns: the chunk times of all stages as one prediction, and the two answers made with it: pieces that let all stages
work at once, and pieces that leave decoding streams their pace.
Does not own: whose chunk goes next (``engine.prefill``).
Invariant: a chunk has at least ``MIN_CHUNK`` tokens, or all that is left of its prompt, so prefill always progresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_cluster.engine.curves import ENOUGH_CHUNKS, ChunkCurve

# A chunk reads all weights, however short it is.
MIN_CHUNK = 32
# Before chunks were measured a prompt is cut into so many of them for each stage.
CHUNKS_PER_STAGE = 2
# What a microbatch costs beside computing (header, frame, report), where the measured fixed cost is lower.
_LEAST_OVERHEAD_SECONDS = 0.001
# Where decoding alone (nearly) uses up the budget, prefill still gets this part of the decode cycle: streams that wait
# for their first token are worse off than those that wait for their next one.
_LEAST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """What decodes beside a prompt: ``cycle_seconds`` is Σ t over the groups, ``step_seconds`` the longest t.

    ``budget_seconds`` is what the time between two tokens of a stream may come to.
    """

    cycle_seconds: float
    step_seconds: float
    budget_seconds: float


class ChunkTimes:
    """Seconds that the slowest stage takes for a chunk; ``observe`` feeds it the reports."""

    def __init__(self, num_stages: int) -> None:
        self._curves = [ChunkCurve() for _ in range(num_stages)]
        self._prompt_curve: ChunkCurve | None = None

    def observe(self, stage: int, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """A microbatch of these (position, length) took the stage so long; several prompts count with their padding."""
        squares = sum(length * (length + 2 * position) for position, length in chunks)
        self._curves[stage].add(squares, sum(length for _, length in chunks), seconds)

    @property
    def is_measured(self) -> bool:
        return all(curve.num_samples >= ENOUGH_CHUNKS for curve in self._curves)

    def seconds(self, position: int, length: int) -> float:
        """A chunk of ``length`` behind ``position`` tokens, on the stage that takes longest for it."""
        squares = length * (length + 2 * position)
        return max(a * squares + b * length + c for a, b, c in self._terms())

    def length(self, position: int, seconds: float) -> int:
        """The longest chunk behind ``position`` tokens that no stage takes more than ``seconds`` for; may be 0."""
        return min(_longest(terms, position, seconds) for terms in self._terms())

    def work(self, start: int, end: int) -> tuple[float, float]:
        """Of the tokens from ``start`` to ``end``: seconds on the slowest stage in one piece, and what a cut adds."""
        squares = end * end - start * start
        return max((a * squares + b * (end - start), max(c, _LEAST_OVERHEAD_SECONDS)) for a, b, c in self._terms())

    def _terms(self) -> list[tuple[float, float, float]]:
        return [curve.terms for curve in self._curves]


def overlapping_length(times: ChunkTimes, num_stages: int, position: int, start: int, end: int, backlog: int) -> int:
    """Nothing decodes: chunks of a prompt (tokens ``start`` to ``end``) of equal time, so many that all stages overlap.

    m chunks of a stage's work W, each cut costing c, take W + m·c + (P − 1)·(W/m + c): least at m = √((P − 1)·W/c).
    ``backlog`` is how many tokens wait in all: the pipeline fills and drains once for all of them.
    """
    if not times.is_measured:
        return math.ceil(backlog / (CHUNKS_PER_STAGE * num_stages))
    work, cut = times.work(start, end)
    work *= max(1.0, backlog / max(1, end - start))
    pieces = max(1.0, math.sqrt((num_stages - 1) * work / cut))
    return times.length(position, work / pieces + cut)


def considerate_length(times: ChunkTimes, num_stages: int, position: int, pace: Pace, previous_seconds: float) -> int:
    """Something decodes: as much as keeps max(n·t + c, (P − 1)·c + t) within the budget, for a chunk's stage time c.

    A decode behind a chunk moves at the chunk's pace through all P stages, but so did its last step behind the chunk of
    the cycle before, c′ (``previous_seconds``): its token comes P·c − c′ + t after the last one. So the first chunk of
    a run is (budget − t)/P, and they grow towards (budget − t)/(P − 1), where c = c′.
    """
    behind = (pace.budget_seconds - pace.step_seconds + (previous_seconds if num_stages > 1 else 0.0)) / num_stages
    room = min(pace.budget_seconds - pace.cycle_seconds, behind)
    return times.length(position, max(room, _LEAST_SHARE * pace.cycle_seconds))


def in_equal_pieces(rest: int, length: int) -> int:
    """A little less than ``length``, where that spares a last chunk of a few tokens."""
    return math.ceil(rest / math.ceil(rest / length))


def _longest(terms: tuple[float, float, float], position: int, seconds: float) -> int:
    """The l with a·l² + (2ap + b)·l + c = seconds."""
    a, b, c = terms
    left = seconds - c
    slope = 2 * a * position + b
    if left <= 0:
        return 0
    if slope <= 0 and a <= 0:
        return 1 << 30  # chunks that cost the same however long they are
    # The root of the quadratic, in the form that also holds for a = 0.
    return int(2 * left / (slope + math.sqrt(slope * slope + 4 * a * left)))
