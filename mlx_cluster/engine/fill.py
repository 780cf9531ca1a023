"""How many groups keep the pipeline full: the cycle formula over measured step times. Pure.

Owns: t_s(b), the time stage *s* takes for a decode step of *b* rows, as a least-squares line through what the reports
said lately; and the choice of the number of groups.
Invariant: until there are measurements for a stage, the answer is one group per stage.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORGET = 0.98  # weight of a sample decays by this with each later one of the same stage
_ENOUGH_SAMPLES = 8
_WORTH_A_MOVE = 0.97


@dataclass(slots=True)
class _Line:
    """Exponentially forgetting least squares of ``seconds`` over ``rows``."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    count: int = 0

    def add(self, rows: int, seconds: float) -> None:
        self.weight = self.weight * _FORGET + 1
        self.x = self.x * _FORGET + rows
        self.y = self.y * _FORGET + seconds
        self.xx = self.xx * _FORGET + rows * rows
        self.xy = self.xy * _FORGET + rows * seconds
        self.count += 1

    def at(self, rows: int) -> float:
        """Predicted seconds; never below zero slope, as more rows are never cheaper."""
        variance = self.xx - self.x * self.x / self.weight
        mean = self.y / self.weight
        if variance < 1e-9 * max(1.0, self.xx):
            return mean * max(rows, 1) / max(self.x / self.weight, 1.0)
        slope = max(0.0, (self.xy - self.x * self.y / self.weight) / variance)
        base = max(0.0, mean - slope * self.x / self.weight)
        return base + slope * rows


class Fill:
    """``num_groups(rows)`` for a pipeline of ``num_stages``; ``observe`` feeds it the reports."""

    def __init__(self, num_stages: int, max_groups: int | None = None, hop_seconds: float = 0.001) -> None:
        self._lines = [_Line() for _ in range(num_stages)]
        self._max_groups = max_groups if max_groups is not None else num_stages + 1
        self._hop_seconds = hop_seconds
        self._current = num_stages

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        """A decode step of ``rows`` rows took stage ``stage`` so many seconds of computation."""
        self._lines[stage].add(rows, seconds)

    def num_groups(self, rows: int) -> int:
        """The number of groups with the smallest cycle for ``rows`` decoding rows (at least one).

        Sticks to its last answer until another is better by 3 %: every move of a row copies its cache.
        """
        num_stages = len(self._lines)
        limit = max(1, min(rows, self._max_groups))
        if any(line.count < _ENOUGH_SAMPLES for line in self._lines):
            return min(limit, num_stages)
        current = min(self._current, limit)
        best, best_seconds = current, self.cycle_seconds(rows, current) * _WORTH_A_MOVE
        for groups in range(1, limit + 1):
            seconds = self.cycle_seconds(rows, groups)
            if seconds < best_seconds:
                best, best_seconds = groups, seconds
        if limit == self._max_groups or best < limit:
            self._current = best
        return best

    def cycle_seconds(self, rows: int, groups: int) -> float:
        """``max(Σ_g max_s t_s(|g|), max_g Σ_s t_s(|g|) + P·h)`` over the real group sizes."""
        quotient, rest = divmod(rows, groups)
        sizes = [quotient + 1] * rest + [quotient] * (groups - rest)
        per_group = [[line.at(size) for line in self._lines] for size in sizes]
        slowest_stage = sum(max(times) for times in per_group)
        longest_trip = max(sum(times) for times in per_group) + len(self._lines) * self._hop_seconds
        return max(slowest_stage, longest_trip)
