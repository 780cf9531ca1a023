"""How many groups keep the pipeline full: the cycle formula over measured step times. Pure.

Owns: every stage's t_s(b), the cost of a hop, and the choice of the number of groups made with them.
Does not own: which row is in which group (``engine.groups``).
Invariant: until every stage has been measured, the answer is one group per stage.
"""

from __future__ import annotations

import statistics
from collections import deque

from mlx_cluster.engine.curves import StepCurve

_UNMEASURED_HOP_SECONDS = 0.001
# Another number of groups must promise this much before rows move: every move of a row copies its cache.
_WORTH_A_MOVE = 0.97
# Of numbers that are as good as the best the lowest is taken: every microbatch costs all processes some Python.
_AS_GOOD = 1.01
# Decisions are looked up; after so many steps of every stage they are made anew.
_STEPS_PER_DECISION = 24


class Fill:
    """``num_groups(rows)`` for a pipeline of ``num_stages``; ``observe`` and ``observe_trip`` feed it the reports."""

    def __init__(self, num_stages: int, max_groups: int | None = None) -> None:
        self.max_groups = max_groups if max_groups is not None else 2 * num_stages
        self.pinned: int | None = None  # the number of groups while a measurement wants it so
        self._curves = [StepCurve() for _ in range(num_stages)]
        self._hops: deque[float] = deque(maxlen=15)
        self._current = num_stages
        self._decisions: dict[int, int] = {}
        self._observations = 0

    # -- measurements ---------------------------------------------------------------------------------

    def observe(self, stage: int, rows: int, seconds: float) -> None:
        """A decode step of ``rows`` rows took stage ``stage`` so many seconds of computation."""
        new_size = self._curves[stage].add(rows, seconds)
        self._observations += 1
        if new_size or self._observations % (_STEPS_PER_DECISION * len(self._curves)) == 0:
            self._decisions.clear()

    def observe_trip(self, seconds: float, compute_seconds: float) -> None:
        """A step that was alone in the pipeline came back after ``seconds``, of which its stages computed so many."""
        self._hops.append(max(0.0, seconds - compute_seconds) / len(self._curves))

    @property
    def is_measured(self) -> bool:
        return all(curve.is_measured for curve in self._curves)

    @property
    def hop_seconds(self) -> float:
        """h: what a microbatch loses at each stage beside its computation, headers and reports included."""
        return statistics.median(self._hops) if self._hops else _UNMEASURED_HOP_SECONDS

    def step_seconds(self, rows: int) -> float | None:
        """t(b) of the slowest stage; None until it was measured."""
        return max(curve.at(rows) for curve in self._curves) if self.is_measured else None

    # -- decision -------------------------------------------------------------------------------------

    def num_groups(self, rows: int) -> int:
        """The number of groups with the smallest cycle for ``rows`` decoding rows (at least one).

        Sticks to its last answer until more of them are better by 3 %, or fewer as good.
        """
        if self.pinned is not None:
            return max(1, min(self.pinned, rows))
        decided = self._decisions.get(rows)
        if decided is None:
            decided = self._decisions[rows] = self._decide(rows)
        return decided

    def _decide(self, rows: int) -> int:
        num_stages = len(self._curves)
        limit = max(1, min(rows, self.max_groups))
        if not self.is_measured:
            return min(limit, num_stages)
        current = min(self._current, limit)
        cycles = {groups: self.cycle_seconds(rows, groups, optimistic=True) for groups in range(1, limit + 1)}
        shortest = min(cycles.values())
        best = next(groups for groups, seconds in cycles.items() if seconds <= _AS_GOOD * shortest)
        if best > current and shortest >= _WORTH_A_MOVE * cycles[current]:
            best = current
        if limit == self.max_groups or best < limit:
            self._current = best
        return best

    def cycle_seconds(self, rows: int, groups: int, *, optimistic: bool = False) -> float:
        """``max(Σ_g max_s t_s(|g|), max_g Σ_s t_s(|g|) + P·h)`` over the real group sizes."""
        size, larger = divmod(rows, groups)
        slowest_stage = longest_trip = 0.0
        for rows_of_group, count in ((size + 1, larger), (size, groups - larger)):
            if count:
                times = [curve.at(rows_of_group, optimistic=optimistic) for curve in self._curves]
                slowest_stage += count * max(times)
                longest_trip = max(longest_trip, sum(times))
        return max(slowest_stage, longest_trip + len(self._curves) * self.hop_seconds)
