"""Stored responses of one gateway, in SQLite.

Owns: the file, its table and its bounds (age, number, bytes); what a restart does to responses that were under way.
Does not own: what a response looks like (``responses_output``), who may read it.
Invariant: one thread touches the database, and every call has a deadline; beyond its bounds the oldest are forgotten.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_cluster import log
from mlx_cluster.errors import InvalidRequest, Unavailable

_log = log.get("gateway")
T = TypeVar("T")

FILE_NAME = "responses.sqlite3"
CALL_SECONDS = 10.0
MAX_CHAIN = 512  # responses that one conversation may go back
MAX_CHAIN_BYTES = 32 * 1024 * 1024

_SCHEMA = """
CREATE TABLE IF NOT EXISTS response (
    id TEXT PRIMARY KEY,
    created REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    status TEXT NOT NULL,
    previous_id TEXT,
    input TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS response_created ON response (created, num_bytes);
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    max_age_seconds: float = 30 * 24 * 3600
    max_responses: int = 10_000
    max_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """One response: what was asked in its own turn (``input``), and the object as the client sees it (``body``)."""

    id: str
    previous_id: str | None
    input: list[dict[str, Any]]
    body: dict[str, Any]


class ResponseStore:
    """Opened at its first use. ``path`` None keeps everything in memory. All calls raise ``Unavailable``."""

    def __init__(self, path: Path | None, bounds: Bounds | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._bounds = bounds if bounds is not None else Bounds()
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")
        self._database: sqlite3.Connection | None = None

    async def put(self, stored: Stored) -> None:
        """Store a response, or replace it by its newer state."""
        await self._call(lambda database: self._put(database, stored))

    async def get(self, id_: str) -> Stored | None:
        return await self._call(lambda database: _one(database, id_))

    async def chain(self, id_: str) -> list[Stored] | None:
        """The conversation that ends with this response, oldest first; None when any of it is not here.

        Raises ``InvalidRequest`` when it is longer than ``MAX_CHAIN`` or larger than ``MAX_CHAIN_BYTES``.
        """
        return await self._call(lambda database: _chain(database, id_))

    async def delete(self, id_: str) -> bool:
        return await self._call(lambda database: _delete(database, id_))

    async def _call(self, function: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            return function(self._opened())

        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except (sqlite3.Error, OSError) as error:  # TimeoutError is one of the latter
            _log.error("stored responses cannot be reached", path=str(self._path), error=repr(error))
            raise Unavailable("this node cannot reach its stored responses (its log says why): try later") from error

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            database = _open(self._path)
            weakref.finalize(self, database.close)
            with database:
                _fail_unfinished(database)
            self._database = database
        return self._database

    def _put(self, database: sqlite3.Connection, stored: Stored) -> None:
        given, body = json.dumps(stored.input), json.dumps(stored.body)
        row = (
            stored.id,
            self._clock(),
            len(given) + len(body),
            str(stored.body.get("status")),
            stored.previous_id,
            given,
            body,
        )
        with database:
            database.execute(
                "INSERT INTO response VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "num_bytes = excluded.num_bytes, status = excluded.status, body = excluded.body",
                row,
            )
            self._forget(database)

    def _forget(self, database: sqlite3.Connection) -> None:
        database.execute("DELETE FROM response WHERE created < ?", (self._clock() - self._bounds.max_age_seconds,))
        number, num_bytes = database.execute("SELECT count(*), coalesce(sum(num_bytes), 0) FROM response").fetchone()
        while number > self._bounds.max_responses or (num_bytes > self._bounds.max_bytes and number > 1):
            id_, freed = database.execute("SELECT id, num_bytes FROM response ORDER BY created LIMIT 1").fetchone()
            database.execute("DELETE FROM response WHERE id = ?", (id_,))
            number, num_bytes = number - 1, num_bytes - freed


def _open(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # conversations are nobody else's to read
    # Only the store's own thread uses it, but whichever thread lets go of the store closes it.
    database = sqlite3.connect(path if path is not None else ":memory:", check_same_thread=False, timeout=5.0)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.executescript(_SCHEMA)
    return database


def _fail_unfinished(database: sqlite3.Connection) -> None:
    """Nobody works any more on what was under way when this node stopped."""
    found = database.execute("SELECT id, body FROM response WHERE status IN ('queued', 'in_progress')").fetchall()
    for id_, text in found:
        error = {"code": "server_error", "message": "the node restarted while it worked on this: send it again"}
        body = {**json.loads(text), "status": "failed", "error": error}
        database.execute("UPDATE response SET status = 'failed', body = ? WHERE id = ?", (json.dumps(body), id_))


def _one(database: sqlite3.Connection, id_: str) -> Stored | None:
    row = database.execute("SELECT id, previous_id, input, body FROM response WHERE id = ?", (id_,)).fetchone()
    return Stored(row[0], row[1], json.loads(row[2]), json.loads(row[3])) if row is not None else None


def _chain(database: sqlite3.Connection, id_: str) -> list[Stored] | None:
    found: list[Stored] = []
    wanted: str | None = id_
    num_bytes = 0
    while wanted is not None:
        stored = _one(database, wanted)
        if stored is None:
            return None
        num_bytes += database.execute("SELECT num_bytes FROM response WHERE id = ?", (wanted,)).fetchone()[0]
        if len(found) == MAX_CHAIN or num_bytes > MAX_CHAIN_BYTES:
            raise InvalidRequest(
                f"previous_response_id: the conversation has more than {MAX_CHAIN} responses, or {MAX_CHAIN_BYTES} "
                "bytes: start a new one",
                param="previous_response_id",
            )
        found.append(stored)
        wanted = stored.previous_id
    return found[::-1]


def _delete(database: sqlite3.Connection, id_: str) -> bool:
    with database:
        return database.execute("DELETE FROM response WHERE id = ?", (id_,)).rowcount > 0
