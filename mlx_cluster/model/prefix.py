"""Entries of the prefix cache: copies of rows' caches that later rows may begin with.

Owns: keeping, cutting, handing out and counting these copies.
Does not own: their files (``model.prefix_disk``), which prompts are worth an entry, and which entry a row begins with
(the engine says so).
Invariant: an entry never changes, whatever happens to the row that it came from or to those that began with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_cluster.microbatch import Saved
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model.cache import Caches
from mlx_cluster.model.prefix_disk import PrefixDisk

async_eval: Any = mx.async_eval  # its types do not cover trees


@dataclass(frozen=True, slots=True)
class _Entry:
    caches: Caches
    positions: int
    num_bytes: int


class Entries:
    """Entries of one slice by id. ``caches`` are those of one row, never a batch's.

    ``make_empty`` gives caches to be filled with what comes from the ``disk``, where there is one.
    """

    def __init__(self, make_empty: Callable[[], Caches]) -> None:
        self.disk: PrefixDisk | None = None
        self._entries: dict[int, _Entry] = {}
        self._make_empty = make_empty

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def store(self, entry: int, caches: Caches, positions: int, saved: Saved | None = None) -> None:
        """Keep a copy of what the caches hold now, which is ``positions`` long; on the disk too, as ``saved``.

        The copy is dispatched at once: a lazy one would hold the row's whole buffers in memory, and grow a graph.
        """
        kept = row_cache.copied(caches)
        async_eval(row_cache.states(kept))
        self._entries[entry] = _Entry(kept, positions, row_cache.num_bytes(kept))
        if saved is not None and self.disk is not None:
            self.disk.save(saved, kept, positions)

    def load(self, entry: int, length: int, digest: bytes = b"") -> Caches | None:
        """Caches of a new row that hold the entry's first ``length`` positions; None where that cannot be."""
        if digest and entry not in self._entries:
            self._fetch(entry, digest)
        found = self._entries.get(entry)
        if found is None or not 0 < length <= found.positions:
            return None
        if length < found.positions and not row_cache.can_cut(found.caches):
            return None
        return row_cache.copied(found.caches, without=found.positions - length)

    def _fetch(self, entry: int, digest: bytes) -> None:
        """Bring an entry from the disk, if it is there."""
        if self.disk is None:
            return
        fetched = self.disk.load(digest, self._make_empty())
        if fetched is not None:
            caches, positions = fetched
            self._entries[entry] = _Entry(caches, positions, row_cache.num_bytes(caches))

    def clear(self) -> None:
        """Forget all entries; files on the disk stay."""
        self._entries.clear()

    def evict(self, entry: int) -> None:
        """Forget an entry; unknown ids are ignored, as a stage may have failed to keep one."""
        self._entries.pop(entry, None)
