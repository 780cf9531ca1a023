"""What a stage's work takes, as it was measured: t_s(b) of decode steps, and the time of prefill chunks. Pure.

Owns: ``StepCurve`` (seconds of a step over its rows, whatever its shape) and ``ChunkCurve`` (seconds of a chunk over
its position and length).
Does not own: what is decided with them (``engine.fill``, ``engine.chunking``).
Invariant: a prediction never falls as work grows.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

# A median over so many steps of one size: it follows a cache that grows and shrugs off a step that the system delayed.
_MEMORY = 9
# So many steps of one size are a measurement; fewer only count while there is nothing better.
ENOUGH_STEPS = 3
# So many steps, the last of them not longer ago than this, and a size is firmly known. Others were seen in passing,
# while rows joined and prompts were computed beside them: what they say must not keep anybody from trying.
FIRM_STEPS = 6
_FIRM_FOR_STEPS = 50_000
# Beyond the largest size that is firmly known, up to twice of it, a row more may cost half of what one costs there.
_HOPED_SHARE = 0.5
# A size that was not seen for so many steps weighs half as much when neighbours contradict it.
_HALF_LIFE_STEPS = 500
_LEAST_WEIGHT = 1e-9  # of what is older still: two such neighbours must not weigh nothing together


@dataclass(slots=True)
class _Bucket:
    """Steps of one size."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    seen_at: int = 0


@dataclass(frozen=True, slots=True)
class _Fit:
    """Seconds at some sizes, in their order; they never fall."""

    rows: list[int]
    seconds: list[float]

    def beyond(self, rows: int) -> float:
        """More rows than were ever measured: the median of all slopes, at most in proportion."""
        x, y = self.rows[-1], self.seconds[-1]
        points = zip(self.rows, self.seconds, strict=True)
        slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2)]
        # One size says nothing of the shape.
        slope = min(statistics.median(slopes), y / x) if slopes else y / x
        return y + slope * (rows - x)

    def hoped(self, rows: int) -> float:
        """What a size beyond the largest may take, if all goes well."""
        x, y = self.rows[-1], self.seconds[-1]
        tried = min(rows, 2 * x)
        return min(self.beyond(rows), y * (1 + _HOPED_SHARE * (tried - x) / x) * rows / tried)


class StepCurve:
    """t_s(b): medians at the sizes that were seen, made monotone, and what lies between them."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._num_steps = 0
        self._all: _Fit | None = None
        self._firm: _Fit | None = None

    def add(self, rows: int, seconds: float) -> bool:
        """A step of ``rows`` rows took so long; True when that makes a new size known, or firmly known."""
        bucket = self._buckets.setdefault(rows, _Bucket())
        bucket.seconds.append(seconds)
        self._num_steps += 1
        bucket.seen_at = self._num_steps
        self._all = self._firm = None
        return len(bucket.seconds) in (ENOUGH_STEPS, FIRM_STEPS)

    @property
    def is_measured(self) -> bool:
        return any(len(bucket.seconds) >= ENOUGH_STEPS for bucket in self._buckets.values())

    def at(self, rows: int, *, optimistic: bool = False) -> float:
        """Predicted seconds of a step, 0 when nothing was seen.

        Between two measured sizes it is their line; ``optimistic`` takes the lower of the two instead: a step up in
        the curve may lie anywhere between them, so a size that might be as cheap is worth being tried, and measured.
        What is not firmly known does not count there, and beyond the largest size somewhat more rows may be cheap.
        """
        fit = self._fit_firm() if optimistic else self._fit_all()
        xs, ys = fit.rows, fit.seconds
        if not xs:
            return 0.0
        at = bisect_left(xs, rows)
        if at < len(xs) and xs[at] == rows:
            return ys[at]
        if at == 0:
            return ys[0] * rows / xs[0]
        if at == len(xs):
            return fit.hoped(rows) if optimistic else fit.beyond(rows)
        if optimistic:
            return ys[at - 1]
        return ys[at - 1] + (ys[at] - ys[at - 1]) * (rows - xs[at - 1]) / (xs[at] - xs[at - 1])

    def _fit_all(self) -> _Fit:
        if self._all is None:
            known = {r: b for r, b in self._buckets.items() if len(b.seconds) >= ENOUGH_STEPS}
            self._all = self._fit(known or self._buckets)
        return self._all

    def _fit_firm(self) -> _Fit:
        if self._firm is None:
            oldest = self._num_steps - _FIRM_FOR_STEPS
            firm = {r: b for r, b in self._buckets.items() if len(b.seconds) >= FIRM_STEPS and b.seen_at >= oldest}
            self._firm = self._fit(firm) if firm else self._fit_all()
        return self._firm

    def _fit(self, known: Mapping[int, _Bucket]) -> _Fit:
        """Pool neighbours that contradict monotony (isotonic regression), weighing what was seen lately more."""
        pools: list[tuple[float, float, list[int]]] = []  # seconds, weight, sizes
        for rows in sorted(known):
            bucket = known[rows]
            lately = 0.5 ** ((self._num_steps - bucket.seen_at) / _HALF_LIFE_STEPS)
            weight = len(bucket.seconds) * max(lately, _LEAST_WEIGHT)
            pools.append((statistics.median(bucket.seconds), weight, [rows]))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (y1, w1, r1), (y2, w2, r2) = pools[-2:]
                pools[-2:] = [((y1 * w1 + y2 * w2) / (w1 + w2), w1 + w2, r1 + r2)]
        return _Fit([r for _, _, sizes in pools for r in sizes], [y for y, _, sizes in pools for _ in sizes])


# The terms of a chunk's time, scaled to about one at 256 tokens.
_SCALES = (256.0**2, 256.0, 1.0)
_KEEP = 0.995  # a sample's weight decays by this with each later one
ENOUGH_CHUNKS = 3
# A sample this many times above the prediction is a delay of the system, not a law: it counts as this much.
_OUTLIER = 3.0


class ChunkCurve:
    """Seconds of a chunk of ``l`` tokens behind ``p`` others: ``a·(l² + 2pl) + b·l + c``, no term below zero.

    The first term is attention (summed over a whole prompt it is a·n²), the last what a chunk costs however short it
    is. Least squares with exponential forgetting; of the terms that may be zero the fewest that explain the samples.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._xx = [[0.0] * 3 for _ in range(3)]
        self._xy = [0.0] * 3
        self._yy = 0.0
        self._terms: tuple[float, float, float] | None = None

    def add(self, squares: float, tokens: float, seconds: float) -> None:
        """``squares`` is Σ(l² + 2pl), ``tokens`` Σl over the rows of the microbatch."""
        if self.num_samples > 2 * ENOUGH_CHUNKS:
            a, b, c = self.terms
            seconds = min(seconds, _OUTLIER * (a * squares + b * tokens + c))
        x = (squares / _SCALES[0], tokens / _SCALES[1], 1.0)
        for i in range(3):
            self._xy[i] = self._xy[i] * _KEEP + x[i] * seconds
            for j in range(3):
                self._xx[i][j] = self._xx[i][j] * _KEEP + x[i] * x[j]
        self._yy = self._yy * _KEEP + seconds * seconds
        self.num_samples += 1
        self._terms = None

    @property
    def terms(self) -> tuple[float, float, float]:
        """(a, b, c) in seconds per squared token, per token and per chunk."""
        if self._terms is None:
            a, b, c = self._solve()
            self._terms = (a / _SCALES[0], b / _SCALES[1], c / _SCALES[2])
        return self._terms

    def _solve(self) -> tuple[float, float, float]:
        best, best_loss = (0.0, 0.0, 0.0), self._yy
        for size in (1, 2, 3):
            for chosen in combinations((1, 2, 0), size):
                solution = self._least_squares(chosen)
                if solution is None or min(solution) < 0:
                    continue
                terms = [0.0, 0.0, 0.0]
                for index, value in zip(chosen, solution, strict=True):
                    terms[index] = value
                loss = self._loss(terms)
                if loss < 0.95 * best_loss - 1e-9 * self._yy:
                    best, best_loss = (terms[0], terms[1], terms[2]), loss
        return best

    def _least_squares(self, chosen: tuple[int, ...]) -> list[float] | None:
        """Gauss elimination of the chosen terms' normal equations; None when they do not tell the terms apart."""
        rows = [[self._xx[i][j] for j in chosen] + [self._xy[i]] for i in chosen]
        for i, pivot_row in enumerate(rows):
            pivot = pivot_row[i]
            if pivot <= 1e-7 * self._xx[chosen[i]][chosen[i]]:
                return None
            for k in range(i + 1, len(rows)):
                factor = rows[k][i] / pivot
                rows[k] = [value - factor * top for value, top in zip(rows[k], pivot_row, strict=True)]
        solution = [0.0] * len(rows)
        for i in reversed(range(len(rows))):
            known = sum(rows[i][j] * solution[j] for j in range(i + 1, len(rows)))
            solution[i] = (rows[i][-1] - known) / rows[i][i]
        return solution

    def _loss(self, terms: list[float]) -> float:
        quadratic = sum(terms[i] * terms[j] * self._xx[i][j] for i in range(3) for j in range(3))
        linear = sum(terms[i] * self._xy[i] for i in range(3))
        return self._yy - 2 * linear + quadratic
