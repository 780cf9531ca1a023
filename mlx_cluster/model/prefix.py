"""Entries of the prefix cache: copies of rows' caches that later rows may begin with.

Owns: keeping, cutting, handing out and counting these copies.
Does not own: which prompts are worth an entry, and which entry a row begins with (the engine says so).
Invariant: an entry never changes, whatever happens to the row that it came from or to those that began with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_cluster.model import cache as row_cache
from mlx_cluster.model.cache import Caches

async_eval: Any = mx.async_eval  # its types do not cover trees


@dataclass(frozen=True, slots=True)
class _Entry:
    caches: Caches
    positions: int
    num_bytes: int


class Entries:
    """Entries of one slice by id. ``caches`` are those of one row, never a batch's."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def store(self, entry: int, caches: Caches, positions: int) -> None:
        """Keep a copy of what the caches hold now, which is ``positions`` long.

        The copy is dispatched at once: a lazy one would hold the row's whole buffers in memory, and grow a graph.
        """
        kept = row_cache.copied(caches)
        async_eval(row_cache.states(kept))
        self._entries[entry] = _Entry(kept, positions, row_cache.num_bytes(kept))

    def load(self, entry: int, length: int) -> Caches | None:
        """Caches of a new row that hold the entry's first ``length`` positions; None where that cannot be."""
        found = self._entries.get(entry)
        if found is None or not 0 < length <= found.positions:
            return None
        if length < found.positions and not row_cache.can_cut(found.caches):
            return None
        return row_cache.copied(found.caches, without=found.positions - length)

    def evict(self, entry: int) -> None:
        """Forget an entry; unknown ids are ignored, as a stage may have failed to keep one."""
        self._entries.pop(entry, None)
