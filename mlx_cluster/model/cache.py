"""Caches of rows: one list per row while it is alone, one batch for the rows that decode together.

Owns: joining, leaving and ordering of a group's rows on mlx-lm's own cache classes.
Does not own: what the slots of a slice are (``model.slice``) and which rows form a group (the engine says so).
Invariant: after ``arrange(rows)`` the parts of a group are exactly these rows in this order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, BatchKVCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

# The caches of one row, or of one batch: one per slot of the slice.
Caches = list[Any]


def can_batch(caches: Caches) -> bool:
    """Whether rows with these caches can be merged into one batch.

    QuantizedKVCache and ChunkedKVCache cannot, for instance; rows that have them decode one after the other.
    """
    return all(
        all(can_batch([part]) for part in cache.caches) if isinstance(cache, CacheList) else hasattr(cache, "merge")
        for cache in caches
    )


def states(caches: Caches) -> list[Any]:
    """Everything that must be evaluated with a step, so that no graph grows from token to token."""
    return [cache.state for cache in caches]


def num_bytes(caches: Caches) -> int:
    return sum(cache.nbytes for cache in caches if not cache.empty())


@dataclass(frozen=True, slots=True)
class Cost:
    """What a row's caches take: ``fixed_bytes``, and ``bytes_per_position`` for each position that it has."""

    fixed_bytes: int
    bytes_per_position: int


def cost(caches: Caches) -> Cost:
    """The cost of rows like this one, which has a few positions. Nothing is evaluated.

    A sliding window counts as full from the beginning: it is small, and a row that outgrows it costs no more.
    """
    fixed = growing = 0
    for part in parts(caches):
        if getattr(part, "keys", None) is None:
            fixed += part.nbytes
            continue
        # Keys and values have their positions, with those reserved for later, next to last.
        arrays = [array for _, array in tree_flatten([part.keys, part.values])]
        per_position = sum(array.nbytes // array.shape[-2] for array in arrays)
        if isinstance(part, RotatingKVCache):
            fixed += per_position * part.max_size
        else:
            growing += per_position
    return Cost(fixed, growing)


def always_cuts(caches: Caches) -> bool:
    """Whether caches of this kind can be cut to fewer positions, however many they have."""
    return all(isinstance(part, KVCache | QuantizedKVCache) for part in parts(caches))


def can_cut(caches: Caches) -> bool:
    """Whether these can: a sliding window also until it is full, for it has lost nothing yet."""
    return all(
        isinstance(part, KVCache | QuantizedKVCache) or (isinstance(part, RotatingKVCache) and part.is_trimmable())
        for part in parts(caches)
    )


def copied(caches: Caches, *, without: int = 0) -> Caches:
    """A row's caches once more, less their last ``without`` positions, as small as they can be. Not evaluated.

    They share no array object with the originals, which assign into theirs.
    """
    copies = [_shell(cache) for cache in caches]
    if without:
        for cache in copies:
            cache.trim(without)
    for part in parts(copies):
        if getattr(part, "keys", None) is not None:
            part.keys, part.values = tree_map(mx.contiguous, part.keys_and_values())
        else:
            vars(part).update(tree_map(_again, vars(part)))
    return copies


def _shell(cache: Any) -> Any:
    shell = copy.copy(cache)
    if isinstance(cache, CacheList):
        shell.caches = tuple(_shell(part) for part in cache.caches)
    return shell


def _again(value: Any) -> Any:
    return mx.contiguous(value) if isinstance(value, mx.array) else value


def parts(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches with those inside a ``CacheList`` in its place."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from parts(cache.caches)
        else:
            yield cache


def grow(caches: Caches, length: int) -> None:
    """Make room for ``length`` more positions in caches that would grow now, up to the border of a block.

    mlx-lm's grow by whole blocks from wherever they stand: one that began with 224 positions would hold 480 after one
    more. The engine counts whole blocks in all, and promises memory by that.
    """
    for cache in parts(caches):
        if type(cache) not in (KVCache, BatchKVCache) or cache.keys is None:
            continue
        held = cache.keys.shape[2]
        wanted = (cache.offset if type(cache) is KVCache else cache._idx) + length
        if wanted > held:
            room = -(-wanted // cache.step) * cache.step - held
            cache.keys, cache.values = (
                mx.concatenate([array, mx.zeros((*array.shape[:2], room, array.shape[3]), array.dtype)], axis=2)
                for array in (cache.keys, cache.values)
            )


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that go through the slice in one call; ``rows`` are indices into those of the group or microbatch.

    ``lengths`` says how many positions each has, where several prompts are padded to the longest.
    """

    rows: Sequence[int]
    caches: Caches
    lengths: Sequence[int] = ()


class Group:
    """The rows that decode as one batch.

    A single row keeps its own caches: they need no padding mask, and they are what mlx-lm itself would use. Where
    caches cannot be merged every row does, and ``parts`` gives one part per row.
    """

    def __init__(self, *, batched: bool) -> None:
        self._batched = batched
        self._rows: list[int] = []
        self._batch: Caches | None = None
        self._singles: dict[int, Caches] = {}
        self._dead: set[int] = set()

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that are here, in batch order, without those that were dropped."""
        return tuple(row for row in self._rows if row not in self._dead)

    def drop(self, row: int) -> None:
        """Forget a row. A batch still carries it until ``arrange`` takes it out, or is freed when all are gone."""
        self._singles.pop(row, None)
        self._dead.add(row)
        if not self.rows:
            self._rows, self._batch, self._dead = [], None, set()

    def take(self, row: int) -> Caches:
        """Remove a row and return its own caches."""
        caches = self._single(row)
        self.drop(row)
        return caches

    def peek(self, row: int) -> Caches:
        """A row's caches, for whoever copies them at once; the row stays."""
        return self._singles[row] if self._batch is None else self._extract(row)

    def arrange(self, rows: Sequence[int], joining: Mapping[int, Caches], *, apart: bool = False) -> dict[int, Caches]:
        """Make the group exactly ``rows`` in this order; ``joining`` are the caches of those that are not here yet.

        ``apart`` asks for caches of each row's own, which can be cut one by one.
        Returns the caches of rows that left, for whoever keeps them aside.
        """
        wanted = set(rows)
        left = {row: self.take(row) for row in self.rows if row not in wanted}
        batched = self._batched and not apart and len(rows) >= 2
        if tuple(rows) == self.rows and not self._dead and batched == (self._batch is not None):
            return left
        if not batched:
            self._singles = {row: joining[row] if row in joining else self._single(row) for row in rows}
            self._batch = None
        else:
            self._rebatch(rows, joining)
        self._rows, self._dead = list(rows), set()
        return left

    def own(self, row: int) -> Caches | None:
        """A row's own caches, to be changed in place; None while it is part of a batch."""
        return self._singles.get(row)

    def parts(self) -> list[Part]:
        """What to run: one batch, or one part per row."""
        if self._batch is not None:
            return [Part(range(len(self._rows)), self._batch)]
        return [Part(range(i, i + 1), self._singles[row]) for i, row in enumerate(self._rows)]

    @property
    def num_bytes(self) -> int:
        batch = num_bytes(self._batch) if self._batch is not None else 0
        return batch + sum(num_bytes(caches) for caches in self._singles.values())

    def _single(self, row: int) -> Caches:
        if self._batch is None:
            return self._singles[row]
        caches = self._extract(row)
        # An unevaluated copy would hold the whole batch in memory.
        mx.eval(states(caches))
        return caches

    def _extract(self, row: int) -> Caches:
        assert self._batch is not None
        index = self._rows.index(row)
        return [cache.extract(index) for cache in self._batch]

    def _rebatch(self, rows: Sequence[int], joining: Mapping[int, Caches]) -> None:
        """Filter what stays, extend by what comes, and permute only when the order asks for it."""
        new = {row: joining[row] if row in joining else self._singles[row] for row in rows if self._comes(row, joining)}
        order = [row for row in rows if row not in new]
        if self._batch is not None and order:
            _select(self._batch, [self._rows.index(row) for row in order], len(self._rows))
        else:
            self._batch = None
        if new:
            merged = merge(list(new.values()))
            if self._batch is None:
                self._batch = merged
            else:
                for mine, theirs in zip(self._batch, merged, strict=True):
                    mine.extend(theirs)
            order += new
        assert self._batch is not None
        _select(self._batch, [order.index(row) for row in rows], len(order))
        self._singles = {}

    def _comes(self, row: int, joining: Mapping[int, Caches]) -> bool:
        return row in joining or row in self._singles


def merge(rows: Sequence[Caches]) -> Caches:
    """One batch of the caches of several rows, padded on the left to the longest."""
    return [slot[0].merge(list(slot)) for slot in zip(*rows, strict=True)]


def fill_ghost(cache: Any) -> None:
    """Give a stand-in cache the smallest content, so that it batches as a used one does.

    An empty ``ArraysCache`` would merge into one with padding, and then answer with a mask where the real one has none.
    """
    for part in cache.caches if isinstance(cache, CacheList) else (cache,):
        if isinstance(part, ArraysCache):
            part.cache = [mx.zeros((1, 1)) for _ in part.cache]


def advance_ghosts(ghosts: Iterable[Any], batch: int, length: int) -> None:
    """Count ``length`` positions on stand-in caches: one head of one dimension stands for a layer's keys and values."""
    for ghost in ghosts:
        if isinstance(ghost, CacheList):
            advance_ghosts(ghost.caches, batch, length)
        elif hasattr(ghost, "update_and_fetch"):
            nothing = mx.zeros((batch, 1, length, 1))
            ghost.update_and_fetch(nothing, nothing)
        elif hasattr(ghost, "advance"):
            ghost.advance(length)


def _select(batch: Caches, indices: list[int], size: int) -> None:
    """Keep these rows, in this order. ``indices`` is never empty: mlx-lm's filter cannot take that."""
    if indices == list(range(size)):
        return
    for cache in batch:
        cache.filter(mx.array(indices))
