"""Stored responses: what comes back, what is forgotten, what a restart does."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from mlx_cluster.errors import InvalidRequest, Unavailable
from mlx_cluster.gateway import store as module
from mlx_cluster.gateway.store import Bounds, ResponseStore, Stored


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def made(id_: str, previous: str | None = None, **body: Any) -> Stored:
    return Stored(id_, previous, [{"type": "message", "content": "ä"}], {"id": id_, "status": "completed", **body})


async def test_what_is_put_comes_back_and_can_be_deleted_once(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "deep" / "responses.sqlite3")
    await store.put(made("a"))
    assert await store.get("a") == made("a")
    assert await store.get("b") is None
    assert [await store.delete("a"), await store.delete("a")] == [True, False]
    assert await store.get("a") is None


async def test_a_newer_state_replaces_the_older(tmp_path: Path) -> None:
    store = ResponseStore(None)
    await store.put(made("a", status="queued"))
    await store.put(made("a"))
    assert await store.get("a") == made("a")


async def test_a_chain_is_oldest_first_and_whole_or_not_at_all() -> None:
    store = ResponseStore(None)
    for stored in (made("a"), made("b", "a"), made("c", "b")):
        await store.put(stored)
    assert [stored.id for stored in await store.chain("c") or ()] == ["a", "b", "c"]
    await store.delete("a")
    assert await store.chain("c") is None


async def test_a_chain_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHAIN", 2)
    store = ResponseStore(None)
    for stored in (made("a"), made("b", "a"), made("c", "b")):
        await store.put(stored)
    assert len(await store.chain("b") or ()) == 2
    with pytest.raises(InvalidRequest, match="more than 2"):
        await store.chain("c")


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        (Bounds(max_responses=2), ["b", "c"]),
        (Bounds(max_age_seconds=3.5), ["b", "c"]),
        (Bounds(max_bytes=1), ["c"]),  # the newest stays, whatever its size
        (Bounds(), ["a", "b", "c"]),
    ],
)
async def test_beyond_a_bound_the_oldest_is_forgotten(bounds: Bounds, left: list[str]) -> None:
    store = ResponseStore(None, bounds, Clock())
    for id_ in ("a", "b", "c"):
        await store.put(made(id_))
    assert [id_ for id_ in ("a", "b", "c") if await store.get(id_) is not None] == left


async def test_a_restart_keeps_what_was_finished_and_fails_what_was_not(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite3"
    before = ResponseStore(path)
    await before.put(made("a"))
    await before.put(made("b", status="in_progress"))
    after = ResponseStore(path)
    assert await after.get("a") == made("a")
    found = await after.get("b")
    assert found is not None
    assert (found.body["status"], found.body["error"]["code"]) == ("failed", "server_error")
    assert "restarted" in found.body["error"]["message"]


async def test_the_file_is_nobody_elses_to_read(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite3"
    await ResponseStore(path).put(made("a"))
    assert path.stat().st_mode & 0o077 == 0


async def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite3"
    path.write_bytes(b"not a database, but something else " * 100)
    with pytest.raises(Unavailable, match="stored responses"):
        await ResponseStore(path).get("a")


def test_sqlite_can_do_what_the_store_asks() -> None:
    assert sqlite3.sqlite_version_info >= (3, 24)  # ON CONFLICT DO UPDATE
