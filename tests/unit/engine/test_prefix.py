"""The prefix index against a list of token tuples, searched the slow way."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.prefix import BLOCK_TOKENS, Hit, Limits, PrefixIndex, digest


def index(**limits: object) -> PrefixIndex:
    defaults: dict[str, object] = {"max_bytes": 10_000, "bytes_per_position": 1, "min_tokens": 1}
    return PrefixIndex(Limits(**{**defaults, **limits}))  # type: ignore[arg-type]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_conversation_reuses_all_of_its_last_turn() -> None:
    cache = index()
    first = cache.store("", range(100), 0)
    assert first is not None
    assert cache.lookup("", [*range(100), 7, 8, 9], 1) == Hit(first.entry, 100)
    assert cache.lookup("", [*range(60), 500], 1) == Hit(first.entry, 60)
    assert cache.lookup("", [500, *range(60)], 1) is None


def test_at_least_one_token_is_left_to_compute() -> None:
    cache = index()
    stored = cache.store("", range(100), 0)
    assert stored is not None
    assert cache.lookup("", range(100), 1) == Hit(stored.entry, 99)
    assert cache.lookup("", range(64), 1) == Hit(stored.entry, 63)


def test_short_hits_do_not_count() -> None:
    cache = index(min_tokens=32)
    assert cache.store("", range(31), 0) is None
    cache.store("", range(100), 0)
    assert cache.lookup("", [*range(31), 999], 1) is None
    assert cache.lookup("", [*range(32), 999], 1) is not None


def test_tenants_do_not_share() -> None:
    cache = index()
    cache.store("a", range(100), 0)
    assert cache.lookup("b", range(100), 1) is None
    assert cache.lookup("a", range(100), 1) is not None


def test_a_longer_entry_replaces_the_prefixes_of_itself() -> None:
    cache = index()
    first, second = cache.store("", range(50), 0), cache.store("", range(90), 1)
    assert first is not None
    assert second is not None
    assert second.evict == (first.entry,)
    assert cache.store("", range(70), 2) is None, "it is covered"
    assert len(cache) == 1


def test_the_least_recently_used_goes_first() -> None:
    cache = index(max_bytes=250)
    a, b = cache.store("", range(100), 0), cache.store("", range(1000, 1100), 1)
    assert a is not None
    assert b is not None
    cache.lookup("", range(100), 2)
    c = cache.store("", range(2000, 2100), 3)
    assert c is not None
    assert c.evict == (b.entry,)
    assert cache.store("", range(300), 4) is None, "it would not fit at all"


def test_entries_age() -> None:
    cache = index(ttl_seconds=10)
    stored = cache.store("", range(100), 0)
    assert stored is not None
    cache.lookup("", range(100), 8)
    assert cache.expire(15) == []
    assert cache.expire(19) == [stored.entry]
    assert cache.lookup("", range(100), 20) is None
    assert cache.num_bytes == 0


def test_what_a_stage_lost_is_forgotten() -> None:
    cache = index()
    stored = cache.store("", range(100), 0)
    assert stored is not None
    assert cache.forget(stored.entry)
    assert not cache.forget(stored.entry)
    assert cache.lookup("", range(100), 1) is None


def test_caches_that_cannot_be_cut_hit_whole_entries_only() -> None:
    cache = index(can_trim=False)
    short, long = cache.store("", range(40), 0), cache.store("", range(80), 0)
    assert short is not None
    assert long is not None
    assert long.evict == ()
    assert cache.lookup("", range(60), 1) == Hit(short.entry, 40)
    assert cache.lookup("", range(90), 1) == Hit(long.entry, 80)
    assert cache.lookup("", range(80), 1) == Hit(short.entry, 40), "the whole prompt may not come from the cache"
    assert cache.lookup("", range(30), 1) is None


def test_with_a_disk_what_leaves_memory_is_known_and_comes_back() -> None:
    cache = index(max_bytes=250, disk_max_bytes=1000)
    a, b, c = (cache.store("", range(1000 * i, 1000 * i + 100), i) for i in range(3))
    assert a is not None
    assert b is not None
    assert c is not None
    assert c.evict == (a.entry,)
    assert (len(cache), cache.num_on_disk, cache.num_bytes) == (2, 1, 200)
    assert cache.lookup("", range(101), 4) == Hit(a.entry, 100)
    assert cache.fetch(a.entry) == (digest("", range(100)), (b.entry,))
    assert cache.fetch(a.entry) == (b"", ()), "it is in memory now"
    assert (len(cache), cache.num_on_disk, cache.num_bytes) == (2, 1, 200)


def test_entries_do_not_age_on_the_disk() -> None:
    cache = index(ttl_seconds=10, disk_max_bytes=1000)
    stored = cache.store("", range(100), 0)
    assert stored is not None
    assert cache.expire(11) == [stored.entry]
    assert cache.expire(1e9) == []
    assert cache.lookup("", range(101), 1e9) == Hit(stored.entry, 100)


def test_the_disk_has_a_bound_too() -> None:
    cache = index(max_bytes=100, disk_max_bytes=250)
    for i in range(5):
        cache.store("", range(1000 * i, 1000 * i + 100), i)
    assert (len(cache), cache.num_on_disk) == (1, 2)
    assert cache.lookup("", range(101), 9) is None
    assert cache.lookup("", range(2000, 2101), 9) is not None


def test_what_lay_on_the_disks_before_is_found_again() -> None:
    cache = index(max_bytes=150, disk_max_bytes=1000)
    assert cache.restore("a", range(100), 0)
    assert not cache.restore("a", range(50), 0), "it is covered"
    assert not cache.restore("a", range(1000, 1200), 0), "it would not fit memory"
    assert (len(cache), cache.num_bytes, cache.num_on_disk) == (0, 0, 1)
    assert cache.lookup("b", range(101), 1) is None
    hit = cache.lookup("a", range(101), 1)
    assert hit is not None
    assert cache.fetch(hit.entry) == (digest("a", range(100)), ())


def test_a_digest_tells_salts_from_tokens() -> None:
    names = {digest("", [1, 2]), digest("", [1, 2, 0]), digest("a", [1, 2]), digest("", [2, 1]), digest("ab", [1])}
    assert len(names) == 5


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=3).flatmap(
    lambda pattern: st.integers(1, 4 * BLOCK_TOKENS).map(lambda n: tuple((pattern * n)[:n]))
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["store", "lookup"]), tokens), max_size=25), st.booleans(), st.integers(50, 500)
)
def test_it_agrees_with_a_slow_search(steps: list[tuple[str, tuple[int, ...]]], trim: bool, max_bytes: int) -> None:
    cache = index(can_trim=trim, max_bytes=max_bytes)
    known: dict[int, tuple[int, ...]] = {}
    for now, (what, ids) in enumerate(steps):
        if what == "store":
            stored = cache.store("", ids, now)
            if stored is not None:
                known[stored.entry] = ids
                for gone in stored.evict:
                    del known[gone]
        else:
            hit = cache.lookup("", ids, now)
            usable = len(ids) - 1
            if trim:
                best = max((min(common(k, ids), usable) for k in known.values()), default=0)
            else:
                best = max((len(k) for k in known.values() if len(k) <= usable and ids[: len(k)] == k), default=0)
            assert (hit.length if hit else 0) == best
            if hit is not None:
                assert known[hit.entry][: hit.length] == ids[: hit.length]
        assert cache.num_bytes == sum(map(len, known.values())) <= max_bytes
        assert len(cache) == len(known)
