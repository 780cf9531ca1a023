"""Groups: after any sequence of joins and leaves every row holds exactly its own keys."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_cluster.model import cache as row_cache
from mlx_cluster.model.cache import Caches, Cost, Group
from mlx_cluster.model.quantized_cache import KvFormat


def append(caches: Caches, values: list[int]) -> None:
    """One position per row: the key is the value."""
    for cache in caches:
        keys = mx.broadcast_to(mx.array(values, dtype=mx.float32).reshape(-1, 1, 1, 1), (len(values), 1, 1, 64))
        cache.update_and_fetch(keys, keys)


def content(caches: Caches) -> list[int]:
    """The keys of a single row, in order."""
    (cache,) = caches
    keys, _ = cache.keys_and_values()
    if isinstance(cache, QuantizedKVCache):
        keys = mx.dequantize(*keys, group_size=cache.group_size, bits=cache.bits)
    return [int(value) for value in keys[0, 0, :, 0].tolist()]  # type: ignore[union-attr,arg-type]


ROW_CACHES: dict[str, Callable[[], Any]] = {
    "plain": KVCache,
    "8 bits": KvFormat(8, 64).empty_row,
    "4 bits": KvFormat(4, 32).empty_row,
}


def fresh(row: int, length: int, make: Callable[[], Any] = KVCache) -> Caches:
    caches: Caches = [make()]
    for position in range(length):
        append(caches, [1000 * row + position])
    return caches


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", ROW_CACHES.values(), ids=list(ROW_CACHES))
def test_rows_keep_their_own_keys_through_any_arrangement(make: Callable[[], Any], seed: int, batched: bool) -> None:
    choose = random.Random(seed)
    group = Group(batched=batched)
    aside = {row: fresh(row, 1 + row, make) for row in range(5)}
    expected = {row: [1000 * row + p for p in range(1 + row)] for row in range(5)}
    for step in range(25):
        rows = choose.sample(sorted(expected), choose.randint(1, len(expected)))
        joining = {row: aside.pop(row) for row in rows if row in aside}
        aside |= group.arrange(rows, joining)
        assert group.rows == tuple(rows)
        parts = group.parts()
        assert [index for part in parts for index in part.rows] == list(range(len(rows)))
        assert len(parts) == (1 if batched or len(rows) == 1 else len(rows))
        for part in parts:
            values = [10 * step + rows[index] for index in part.rows]
            append(part.caches, values)
        for row in rows:
            expected[row].append(10 * step + row)
        if step % 9 == 8 and len(expected) > 1:
            gone = choose.choice(rows)
            group.drop(gone)
            del expected[gone]
    for row in group.rows:
        aside[row] = group.take(row)
    assert {row: content(caches) for row, caches in aside.items()} == expected
    assert group.rows == ()
    assert group.num_bytes == 0


def test_a_group_whose_rows_are_all_dropped_frees_its_batch() -> None:
    group = Group(batched=True)
    group.arrange([1, 2], {1: fresh(1, 3), 2: fresh(2, 5)})
    assert group.num_bytes > 0
    group.drop(1)
    assert group.rows == (2,)
    group.drop(2)
    assert (group.rows, group.num_bytes) == ((), 0)
    group.arrange([3], {3: fresh(3, 2)})
    assert content(group.parts()[0].caches) == [3000, 3001]


def test_which_caches_can_be_batched() -> None:
    assert row_cache.can_batch([KVCache(), RotatingKVCache(8), ArraysCache(2), CacheList(KVCache(), ArraysCache(1))])
    assert row_cache.can_batch([KvFormat(8, 64).empty_row()])
    assert not row_cache.can_batch([KVCache(), QuantizedKVCache()])
    assert not row_cache.can_batch([CacheList(KVCache(), ChunkedKVCache(8))])


def test_stand_ins_count_positions_like_the_caches_they_stand_for() -> None:
    ghosts = [KVCache(), RotatingKVCache(4), ArraysCache(2), CacheList(KVCache(), ArraysCache(1))]
    for ghost in ghosts:
        row_cache.fill_ghost(ghost)
    row_cache.advance_ghosts(ghosts, 1, 3)
    row_cache.advance_ghosts(ghosts, 1, 2)
    assert (ghosts[0].offset, ghosts[1].offset, ghosts[3][0].offset) == (5, 5, 5)
    batch = row_cache.merge([ghosts, ghosts])
    row_cache.advance_ghosts(batch, 2, 1)
    assert batch[0].offset.tolist() == [6, 6]
    # A used cache of this kind has no mask of its own; neither may its stand-in.
    assert batch[2].make_mask(1) is None


def grown(cache: Any, values: Sequence[int]) -> Any:
    """One position after the other, as a decode does; an ``ArraysCache`` remembers the last two."""
    for value in values:
        if isinstance(cache, CacheList):
            for part in cache.caches:
                grown(part, [value])
        elif isinstance(cache, ArraysCache):
            cache[0], cache[1] = cache[1], mx.array([[value]])
        else:
            keys = mx.full((1, 1, 1, 64), value, dtype=mx.float32)
            cache.update_and_fetch(keys, keys)
    return cache


def remembered(cache: Any) -> Any:
    if isinstance(cache, CacheList):
        return [remembered(part) for part in cache.caches]
    if isinstance(cache, ArraysCache):
        return [array if array is None else array.item() for array in cache.cache]
    keys = cache.keys_and_values()[0]
    keys = mx.dequantize(*keys, group_size=64, bits=8) if isinstance(cache, QuantizedKVCache) else keys
    return sorted(round(value) for value in keys[0, 0, :, 0].tolist())


KINDS: dict[str, Callable[[], Any]] = {
    "kv": KVCache,
    "quantized": KvFormat(8, 64).empty_row,
    "window": lambda: RotatingKVCache(4),
    "arrays": lambda: ArraysCache(2),
    "list": lambda: CacheList(KVCache(), ArraysCache(2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_a_copy_and_its_original_know_nothing_of_each_other(kind: str, length: int) -> None:
    original = grown(KINDS[kind](), range(length))
    (copy,) = row_cache.copied([original])
    (second,) = row_cache.copied([copy])
    assert remembered(copy) == remembered(original)
    grown(original, [50, 51])
    grown(copy, [60])
    assert remembered(second) == remembered(grown(KINDS[kind](), range(length)))
    assert remembered(original) == remembered(grown(KINDS[kind](), [*range(length), 50, 51]))
    assert remembered(copy) == remembered(grown(KINDS[kind](), [*range(length), 60]))


@pytest.mark.parametrize(("kind", "length"), [("kv", 9), ("quantized", 9), ("window", 3)])
def test_a_copy_may_be_shorter(kind: str, length: int) -> None:
    original = grown(KINDS[kind](), range(length))
    assert row_cache.can_cut([original])
    (copy,) = row_cache.copied([original], without=2)
    assert remembered(copy) == list(range(length - 2))
    assert copy.nbytes < original.nbytes
    assert remembered(grown(copy, [70])) == [*range(length - 2), 70]
    assert remembered(original) == list(range(length))


def test_which_caches_can_be_cut() -> None:
    """A window until it has slid, which only a look at the row's own can tell; never a recurrent state."""
    assert row_cache.always_cuts([KVCache(), CacheList(KVCache(), QuantizedKVCache())])
    assert not row_cache.always_cuts([KVCache(), RotatingKVCache(4)])
    for kind, length in (("window", 4), ("window", 9), ("arrays", 3), ("list", 3)):
        assert not row_cache.can_cut([grown(KINDS[kind](), range(length))])


def test_a_copy_takes_no_more_than_it_holds() -> None:
    original = grown(KVCache(), range(3))
    assert original.nbytes == 2 * 256 * 64 * 4
    assert row_cache.num_bytes(row_cache.copied([original])) == 2 * 3 * 64 * 4


def test_the_cost_of_a_row_tells_what_grows_from_what_does_not() -> None:
    per_position = 2 * 64 * 4
    assert row_cache.cost([grown(KVCache(), [1, 2])]) == Cost(0, per_position)
    assert row_cache.cost([grown(RotatingKVCache(100), [1, 2])]) == Cost(100 * per_position, 0)
    assert row_cache.cost([grown(KINDS["list"](), [1, 2])]) == Cost(2 * 4, per_position)


@pytest.mark.parametrize("begun_with", [1, 224, 256, 300])
@pytest.mark.parametrize("rows", [1, 2])
def test_caches_hold_whole_blocks_from_wherever_they_began(begun_with: int, rows: int) -> None:
    begun = []
    for row in range(rows):
        cache = KVCache()
        cache.keys = cache.values = mx.full((1, 1, begun_with, 64), float(row + 1))  # as a prefix entry is
        cache.offset = begun_with
        begun.append([cache])
    caches = begun[0] if rows == 1 else row_cache.merge(begun)
    for length in (1, 100, 1, 257):
        row_cache.grow(caches, length)
        block = mx.full((rows, 1, length, 64), 7.0)
        keys, _ = caches[0].update_and_fetch(block, block)
        held, positions = caches[0].keys.shape[2], keys.shape[2]
        assert held == -(-positions // 256) * 256
        assert bool(mx.all(keys[:, :, -length:] == 7.0).item())
    assert positions == begun_with + 359
    assert [keys[row, 0, begun_with - 1, 0].item() for row in range(rows)] == [row + 1.0 for row in range(rows)]
