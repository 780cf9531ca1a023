"""What the rows' keys and values take on every stage, and what still fits. Pure.

Owns: a mirror of what the stages hold after the last header: rows with caches of their own, and batches.
Does not own: who is admitted, joins or is preempted (``engine.scheduler``, ``engine.groups``).
Invariants: between two headers the rows, and a second copy of the largest batch, fit the budget of every stage; while a
batch is rearranged the old and the new one do.

A batch pads every row to the longest, and caches grow by blocks of 256 positions. A batch that changes is copied: rows
that join or leave, and rows that ended, cost it twice for the length of one step. That is why the largest batch counts
twice all the time: whatever ends, the copy without it fits. A row that decodes alone has no batch, and is never copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCK_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one stage may use for rows, and what a row takes there. ``budget_bytes`` None is no bound."""

    budget_bytes: int | None
    bytes_per_position: int
    fixed_bytes: int

    def bytes(self, rows: int, positions: int) -> int:
        return rows * self.fixed_bytes + positions * self.bytes_per_position


def padded(positions: int) -> int:
    """Positions as caches reserve them."""
    return -(-positions // BLOCK_POSITIONS) * BLOCK_POSITIONS


@dataclass(frozen=True, slots=True)
class Charge:
    """So many rows of together so many positions, padding included."""

    rows: int = 0
    positions: int = 0

    def __add__(self, other: Charge) -> Charge:
        return Charge(self.rows + other.rows, self.positions + other.positions)

    def __sub__(self, other: Charge) -> Charge:
        return Charge(self.rows - other.rows, self.positions - other.positions)


@dataclass(slots=True)
class _Batch:
    """A group on the stages: padded to ``length``; rows that ended are carried along until it is rearranged."""

    length: int
    living: set[int]
    carried: int  # rows of the batch, dead ones too

    @property
    def charge(self) -> Charge:
        return Charge(self.carried, self.carried * self.length)

    @property
    def dead(self) -> Charge:
        count = self.carried - len(self.living)
        return Charge(count, count * self.length)


_NOTHING = Charge()


class KvBook:
    """One per scheduler. Rows are named by id; lengths are in positions."""

    def __init__(self, stages: Sequence[StageMemory] = ()) -> None:
        self._stages = [stage for stage in stages if stage.budget_bytes is not None]
        self._all_stages = tuple(stages)
        self._single: dict[int, int] = {}  # row → padded positions of its own caches
        self._batches: dict[int, _Batch] = {}
        self._place: dict[int, int] = {}  # row → batch
        self._total = _NOTHING

    # -- what fits --------------------------------------------------------------------------------------

    @property
    def is_bounded(self) -> bool:
        return bool(self._stages)

    @property
    def total(self) -> Charge:
        return self._total

    def fits(self, charge: Charge) -> bool:
        return all(stage.bytes(charge.rows, charge.positions) <= (stage.budget_bytes or 0) for stage in self._stages)

    def fits_beside(self, charge: Charge, spare: Charge = _NOTHING) -> bool:
        """Whether so much fits beside what is there, a second copy of the largest batch (or of ``spare``) included."""
        headroom = self._headroom()
        if spare.positions > headroom.positions:
            headroom = spare
        return self.fits(self._total + charge + headroom)

    def fits_alone(self, positions: int) -> bool:
        """Whether one row of so many positions fits when there is nothing else."""
        return self.fits(Charge(1, padded(positions)))

    def tightest(self, positions: int) -> tuple[int, int, int]:
        """Of the stage where a row of so many positions exceeds its budget most: its index, the bytes, its budget."""
        charge = Charge(1, padded(positions))
        needs = [
            (stage.bytes(charge.rows, charge.positions) / max(1, stage.budget_bytes), index, stage)
            for index, stage in enumerate(self._all_stages)
            if stage.budget_bytes is not None
        ]
        _, index, stage = max(needs, key=lambda need: need[0])
        return index, stage.bytes(charge.rows, charge.positions), stage.budget_bytes or 0

    def may_step(self, group: int, lengths: Mapping[int, int], *, after_others: bool = False) -> bool:
        """Whether the group may decode with exactly these rows (row → positions then).

        ``after_others`` asks whether it may once all other groups have let go of their dead rows.
        """
        if not self._stages:
            return True
        waste = _NOTHING
        if after_others:
            for name, other in self._batches.items():
                if name != group:
                    waste += other.dead
        before = self._total - waste
        new = Charge(len(lengths), len(lengths) * padded(max(lengths.values())))
        batch = self._batches.get(group)
        gone = Charge(0, 0) if batch is None else batch.charge
        left = self._left(batch, lengths)
        moved = _NOTHING
        for row in lengths:
            if row in self._single:
                moved += Charge(1, self._single[row])
        after = before - gone - moved + left + new
        if self._is_copied(batch, lengths) and not self.fits(before + left + self._taken_out(group, lengths) + new):
            return False
        headroom = self._headroom(but=group)
        if len(lengths) > 1 and new.positions > headroom.positions:
            headroom = new
        return self.fits(after + headroom)

    # -- what happens, in the order of the headers -------------------------------------------------------

    def admit(self, row: int, positions: int) -> None:
        """A row with caches of its own."""
        self._single[row] = padded(positions)
        self._total += Charge(1, padded(positions))

    def release(self, row: int) -> None:
        """Its own caches go; a batch carries it on until it is rearranged, or until all its rows are gone."""
        if row in self._single:
            self._total -= Charge(1, self._single.pop(row))
        elif row in self._place:
            self._leave(row)

    def step(self, group: int, lengths: Mapping[int, int]) -> None:
        """The group decodes with exactly these rows."""
        batch = self._batches.pop(group, None)
        if batch is not None:
            self._total -= batch.charge
            for row in batch.living - lengths.keys():
                del self._place[row]
                self._single[row] = batch.length
                self._total += Charge(1, batch.length)
            for row in batch.living & lengths.keys():
                del self._place[row]
        for row in lengths:
            self.release(row)
            self._place[row] = group
        new = _Batch(padded(max(lengths.values())), set(lengths), len(lengths))
        self._batches[group] = new
        self._total += new.charge

    def statistics(self) -> dict[str, int]:
        """``kv_bytes`` and ``kv_budget_bytes`` of the stage that is fullest; no budget is 0."""
        if not self._stages:
            used = max((s.bytes(self._total.rows, self._total.positions) for s in self._all_stages), default=0)
            return {"kv_bytes": used, "kv_budget_bytes": 0}
        use = [(s.bytes(self._total.rows, self._total.positions), s.budget_bytes or 0) for s in self._stages]
        used, budget = max(use, key=lambda pair: pair[0] / max(1, pair[1]))
        return {"kv_bytes": used, "kv_budget_bytes": budget}

    # -- shared -----------------------------------------------------------------------------------------

    def _headroom(self, but: int | None = None) -> Charge:
        """The largest batch that may have to be copied."""
        sizes = (b.charge for name, b in self._batches.items() if name != but and b.carried > 1)
        return max(sizes, key=lambda charge: charge.positions, default=_NOTHING)

    @staticmethod
    def _left(batch: _Batch | None, lengths: Mapping[int, int]) -> Charge:
        """Rows of the batch that live on without it get caches of their own."""
        if batch is None:
            return _NOTHING
        count = len(batch.living - lengths.keys())
        return Charge(count, count * batch.length)

    def _taken_out(self, group: int, lengths: Mapping[int, int]) -> Charge:
        """Rows that come from another batch are taken out of it first."""
        taken = [self._batches[name].length for row in lengths if (name := self._place.get(row, group)) != group]
        return Charge(len(taken), sum(taken))

    @staticmethod
    def _is_copied(batch: _Batch | None, lengths: Mapping[int, int]) -> bool:
        if batch is None:
            return len(lengths) > 1
        return batch.living != lengths.keys() or batch.carried > len(lengths)

    def _leave(self, row: int) -> None:
        name = self._place.pop(row)
        batch = self._batches[name]
        batch.living.discard(row)
        if not batch.living:
            self._total -= batch.charge
            del self._batches[name]
