"""Groups: after any sequence of joins and leaves every row holds exactly its own keys."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_cluster.model import cache as row_cache
from mlx_cluster.model.cache import Caches, Group


def append(caches: Caches, values: list[int]) -> None:
    """One position per row: the key is the value."""
    for cache in caches:
        keys = mx.array(values, dtype=mx.float32).reshape(-1, 1, 1, 1)
        cache.update_and_fetch(keys, keys)


def content(caches: Caches) -> list[int]:
    """The keys of a single row, in order."""
    (cache,) = caches
    keys, _ = cache.keys_and_values()
    return [int(value) for value in keys[0, 0, :, 0].tolist()]  # type: ignore[union-attr,arg-type]


def fresh(row: int, length: int) -> Caches:
    caches: Caches = [KVCache()]
    for position in range(length):
        append(caches, [1000 * row + position])
    return caches


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_rows_keep_their_own_keys_through_any_arrangement(seed: int, batched: bool) -> None:
    choose = random.Random(seed)
    group = Group(batched=batched)
    aside = {row: fresh(row, 1 + row) for row in range(5)}
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
