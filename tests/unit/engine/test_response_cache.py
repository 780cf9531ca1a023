"""Kept answers: what is kept and for whom, the bounds, and a file that outlives the node and survives damage."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_cluster.engine.response_cache import ENTRY_OVERHEAD_BYTES, CachingEngine, ResponseCache
from mlx_cluster.engine.response_file import ResponseFile
from mlx_cluster.errors import StageLost
from mlx_cluster.request import Admitted, Event, Finished, Grammar, Sampling, SequenceRequest, Token
from tests.fake_engine import Script, ScriptedEngine

GREEDY = SequenceRequest("r", "m", (1, 2, 3), 8, Sampling(temperature=0.0), tenant="t", repeatable=True)
TOKENS = (11, 12, 13)


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def cache(max_bytes: int = 100_000, ttl: float = 60.0, file: ResponseFile | None = None) -> tuple[ResponseCache, Clock]:
    clock = Clock()
    return ResponseCache(max_bytes, ttl, clock, file), clock


def engine(kept: ResponseCache, script: Script | None = None, fingerprint: str = "hash") -> CachingEngine:
    return CachingEngine(ScriptedEngine(script or Script(tokens=TOKENS, cached_tokens=2)), kept, fingerprint, "m")


async def collect(front: CachingEngine, request: SequenceRequest = GREEDY) -> list[Event]:
    async with contextlib.aclosing(front.generate(request)) as events:
        return [event async for event in events]


def computed(front: CachingEngine) -> int:
    assert isinstance(front._inner, ScriptedEngine)
    return len(front._inner.requests)


async def test_the_second_time_it_is_not_computed_and_everything_is_the_same() -> None:
    front = engine(cache()[0])
    first = await collect(front)
    again = await collect(front, replace(GREEDY, request_id="other", priority=5, queue_seconds=3.0, choice=2))
    assert first == again == [Admitted(2), *(Token(i, t) for i, t in enumerate(TOKENS)), Finished("length", 3, 3, 2)]
    assert computed(front) == 1
    figures = front.statistics()
    assert (figures["response_cache_hits"], figures["response_cache_misses"]) == (1, 1)
    assert figures["response_cache_entries"] == 1
    assert figures["response_cache_bytes"] > ENTRY_OVERHEAD_BYTES


async def test_log_probabilities_come_back_to_the_last_bit() -> None:
    request = replace(GREEDY, sampling=Sampling(temperature=0.0, top_logprobs=2))
    front = engine(cache()[0])
    assert await collect(front, request) == await collect(front, request)
    assert computed(front) == 1


async def test_a_seed_of_the_clients_makes_a_sampled_answer_repeatable() -> None:
    seeded = replace(GREEDY, sampling=Sampling(temperature=0.9, seed=4))
    front = engine(cache()[0])
    await collect(front, seeded)
    await collect(front, seeded)
    assert computed(front) == 1
    await collect(front, replace(seeded, choice=1))
    await collect(front, replace(seeded, sampling=Sampling(temperature=0.9, seed=5)))
    assert computed(front) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "other"},
        {"prompt": (1, 2, 4)},
        {"max_tokens": 7},
        {"stop_token_ids": frozenset({99})},
        {"grammar": Grammar("regex", "a+")},
        {"sampling": Sampling(temperature=0.0, presence_penalty=0.5)},
        {"sampling": Sampling(temperature=0.0, top_logprobs=0)},
        {"repeatable": False},
        {"emitted": (11,)},
        {"key": "again"},
    ],
)
async def test_whatever_is_not_the_same_is_computed(changes: dict[str, Any]) -> None:
    front = engine(cache()[0])
    await collect(front)
    await collect(front, replace(GREEDY, **changes))
    assert computed(front) == 2


async def test_another_model_of_the_same_name_is_computed() -> None:
    kept, _ = cache()
    await collect(engine(kept))
    other = engine(kept, fingerprint="other weights")
    await collect(other)
    assert computed(other) == 1


async def test_only_whole_answers_are_kept() -> None:
    kept, _ = cache()
    broken = engine(kept, Script(tokens=TOKENS, fail_after=(2, StageLost("gone"))))
    with pytest.raises(StageLost):
        await collect(broken)
    cancelled = engine(kept, Script(tokens=TOKENS, finish="cancelled"))
    await collect(cancelled)
    left = engine(kept)
    async with contextlib.aclosing(left.generate(GREEDY)) as events:
        await anext(events)
        await anext(events)
    whole = engine(kept)
    await collect(whole)
    assert computed(whole) == 1
    assert whole.statistics()["response_cache_entries"] == 1


async def test_an_answer_ages() -> None:
    kept, clock = cache(ttl=60.0)
    front = engine(kept)
    await collect(front)
    clock.now += 59.9
    await collect(front)
    assert computed(front) == 1
    clock.now += 0.2
    await collect(front)
    assert computed(front) == 2
    assert front.statistics()["response_cache_entries"] == 1


async def test_the_least_recently_used_goes_for_room() -> None:
    probe, _ = cache()
    front = engine(probe)
    await collect(front)
    each = front.statistics()["response_cache_bytes"]
    kept, _ = cache(max_bytes=3 * each)
    front = engine(kept)
    for last in (1, 2, 3):
        await collect(front, replace(GREEDY, prompt=(5, 5, last)))
    await collect(front, replace(GREEDY, prompt=(5, 5, 1)))  # used again: 2 is the oldest now
    await collect(front, replace(GREEDY, prompt=(5, 5, 4)))
    figures = front.statistics()
    assert (figures["response_cache_entries"], figures["response_cache_evictions"]) == (3, 1)
    assert figures["response_cache_bytes"] <= 3 * each
    before = computed(front)
    for last in (1, 3, 4):
        await collect(front, replace(GREEDY, prompt=(5, 5, last)))
    assert computed(front) == before
    await collect(front, replace(GREEDY, prompt=(5, 5, 2)))
    assert computed(front) == before + 1


async def test_an_answer_larger_than_the_cache_is_not_kept() -> None:
    front = engine(cache(max_bytes=ENTRY_OVERHEAD_BYTES)[0])
    await collect(front)
    await collect(front)
    assert computed(front) == 2
    assert front.statistics()["response_cache_entries"] == 0


async def test_an_answer_from_the_file_is_as_old_as_it_is(path: Path) -> None:
    clock = Clock()
    with opened(path, clock) as file:
        await collect(engine(ResponseCache(100_000, 60.0, clock, file)))
        clock.now += 40
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        await collect(front)
        assert computed(front) == 0
        clock.now += 21
        await collect(front)
        assert computed(front) == 1


# -- the file -----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "answers.sqlite3"


@contextlib.contextmanager
def opened(path: Path, clock: Clock, max_bytes: int = 100_000, ttl: float = 60.0) -> Iterator[ResponseFile]:
    file = ResponseFile(path, max_bytes, ttl, clock)
    try:
        yield file
    finally:
        file.close()


async def test_answers_survive_a_restart(path: Path) -> None:
    clock = Clock()
    with opened(path, clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        first = await collect(front)
    with opened(path, clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        assert await collect(front) == first
        assert computed(front) == 0
        assert front.statistics()["response_cache_file_entries"] == 1
        assert front.statistics()["response_cache_entries"] == 1  # in memory again
    assert os.stat(path).st_mode & 0o077 == 0


async def test_answers_of_the_file_age_and_go_for_room(path: Path) -> None:
    clock = Clock()
    with opened(path, clock, max_bytes=250) as file:
        for name in (b"a", b"b", b"c"):
            file.put(name, bytes(100))
            clock.now += 1
            assert await file.get(name) == (clock.now - 1, bytes(100))
        assert await file.get(b"a") is None
        assert file.num_entries == 2
        clock.now += 60
        assert await file.get(b"b") is None
    clock.now += 60
    with opened(path, clock) as file:
        assert await file.get(b"c") is None
        assert file.num_entries == 0


@pytest.mark.parametrize("damage", [b"this is no database " * 100, b"SQLite format 3\x00" + bytes(range(200)) * 30])
async def test_a_damaged_file_is_set_aside_and_serving_goes_on(
    path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)  # noqa: ASYNC240
    clock = Clock()
    with opened(path, clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        await collect(front)
        assert computed(front) == 1
    assert path.with_name("answers.sqlite3.damaged").read_bytes() == damage
    shown = capsys.readouterr()
    assert "set aside" in shown.out + shown.err
    with opened(path, clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        await collect(front)
        assert computed(front) == 0


async def test_a_damaged_answer_is_computed_again(path: Path) -> None:
    clock = Clock()
    with opened(path, clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        first = await collect(front)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE answer SET body = x'00112233'")
    with opened(path, clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        assert await collect(front) == first
        assert computed(front) == 1


async def test_a_path_that_cannot_be_written_costs_nobody_an_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    with opened(tmp_path / "file" / "answers", clock) as file:
        front = engine(ResponseCache(100_000, 60.0, clock, file))
        assert len(await collect(front)) == 5
        assert len(await collect(front)) == 5
        assert computed(front) == 1  # memory works
