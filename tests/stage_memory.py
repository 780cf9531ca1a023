"""What stages hold, header by header, written down a second time: the check on ``engine.memory`` in tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_cluster.engine import memory
from mlx_cluster.microbatch import Kind, Microbatch


def blocks(positions: int) -> int:
    return (positions + memory.BLOCK_POSITIONS - 1) // memory.BLOCK_POSITIONS * memory.BLOCK_POSITIONS


@dataclass
class HeldRows:
    """Positions that one stage holds: rows on their own, and batches as (rows, dead or alive; length)."""

    alone: dict[int, int] = field(default_factory=dict)
    batches: dict[int, tuple[list[int], int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    peak: int = 0

    @property
    def positions(self) -> int:
        return sum(self.alone.values()) + sum(len(rows) * length for rows, length in self.batches.values())

    def execute(self, header: Microbatch) -> int:
        """Do what the header says; gives the most positions held at any moment of it."""
        for row in header.release:
            self.alone.pop(row, None)
            self.dead.add(row)
        self._free_dead_batches()
        self.peak = self.positions
        for load in header.load:
            self.lengths[load.row] = load.length
        if header.kind is Kind.PREFILL:
            for row, tokens in zip(header.rows, header.row_tokens(), strict=True):
                self.lengths[row] = self.lengths.get(row, 0) + len(tokens)
                self.alone[row] = blocks(self.lengths[row])
        elif header.kind is Kind.DECODE:
            self._decode(header.group, list(header.rows))
        self.peak = max(self.peak, self.positions)
        return self.peak

    def _decode(self, name: int, rows: list[int]) -> None:
        for row in rows:
            self.lengths[row] += 1
        old, _ = self.batches.get(name, ([], 0))
        for row in old:
            if row not in rows and row not in self.dead:
                self.alone[row] = blocks(self.lengths[row])
        for row in rows:
            if row not in old and row not in self.alone:
                self.alone[row] = blocks(self.lengths[row])  # taken out of another batch
        length = blocks(max(self.lengths[row] for row in rows))
        changed = sorted(old) != sorted(rows)
        if changed and (len(rows) > 1 or len(old) > 1):
            self.peak = max(self.peak, self.positions + len(rows) * length)
        for row in rows:
            self.alone.pop(row, None)
            for other, (members, _) in self.batches.items():
                if other != name and row in members:
                    members.remove(row)
                    members.append(-1)  # its place is freed with the whole batch
        self.batches[name] = (list(rows), length)
        self._free_dead_batches()

    def _free_dead_batches(self) -> None:
        for name, (members, _) in list(self.batches.items()):
            if all(row == -1 or row in self.dead for row in members):
                del self.batches[name]
