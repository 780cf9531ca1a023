"""Kept answers in an SQLite file, so that they outlive the node.

Owns: the file and its one thread, its bound and age limit, checksums, what happens to a file that is damaged.
Does not own: names and contents of the entries (``response_cache``).
Invariants: the event loop never waits for the disk; no trouble with the file reaches a client: an entry that cannot be
read is computed again, and a file that is damaged is set aside with a warning.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mlx_cluster import log

_log = log.get("engine.response_file")
T = TypeVar("T")

# An answer that the disk does not give within this time is computed.
READ_SECONDS = 1.0
# Answers that wait to be written; beyond that the disk is too slow, and further ones are not kept there.
MAX_UNWRITTEN = 256
SIDE_FILES = ("", "-wal", "-shm")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answer (
    name BLOB PRIMARY KEY, kept_at REAL NOT NULL, used_at REAL NOT NULL, checksum INTEGER NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answer_used_at ON answer (used_at);
"""


class ResponseFile:
    """Implements ``response_cache.EntryFile``. Opened at its first use, by its own thread; ``clock`` is wall time."""

    def __init__(self, path: Path, max_bytes: int, ttl_seconds: float, clock: Callable[[], float]) -> None:
        self._path, self._max_bytes, self._ttl_seconds, self._clock = path, max_bytes, ttl_seconds, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kept answers")
        self._database: sqlite3.Connection | None = None
        self._unwritten = 0
        self._num_bytes = 0
        self.num_entries = 0

    async def get(self, name: bytes) -> tuple[float, bytes] | None:
        """When the entry was kept and its body; None when it is not there, too old, damaged or slow to come."""
        try:
            async with asyncio.timeout(READ_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._safely, self._read, name)
        except TimeoutError:
            _log.warning("kept answers are slow to read", path=str(self._path), seconds=READ_SECONDS)
            return None

    def put(self, name: bytes, body: bytes) -> None:
        """Write the entry soon, unless too many wait for that already."""
        if self._unwritten >= MAX_UNWRITTEN:
            return
        self._unwritten += 1
        self._thread.submit(self._safely, self._write, name, body, self._clock()).add_done_callback(self._written)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    # -- on the file's thread ---------------------------------------------------------------------------

    def _written(self, _done: Future[None]) -> None:
        self._unwritten -= 1

    def _safely(self, work: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return work(self._opened(), *arguments)
        except sqlite3.DatabaseError as error:
            _log.warning("kept answers cannot be used", path=str(self._path), error=str(error))
            if not isinstance(error, sqlite3.OperationalError):  # those are about locks and the disk
                self._set_aside()
        except OSError as error:
            _log.warning("kept answers cannot be reached", path=str(self._path), error=str(error))
        return None

    def _read(self, database: sqlite3.Connection, name: bytes) -> tuple[float, bytes] | None:
        now = self._clock()
        row = database.execute("SELECT kept_at, checksum, body FROM answer WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        kept_at, checksum, body = row
        if now - kept_at >= self._ttl_seconds or zlib.crc32(body) != checksum:
            with database:
                self._delete(database, name)
            return None
        with database:
            database.execute("UPDATE answer SET used_at = ? WHERE name = ?", (now, name))
        return kept_at, bytes(body)

    def _write(self, database: sqlite3.Connection, name: bytes, body: bytes, now: float) -> None:
        with database:
            self._delete(database, name)
            database.execute("INSERT INTO answer VALUES (?, ?, ?, ?, ?)", (name, now, now, zlib.crc32(body), body))
            self._num_bytes += len(body)
            self.num_entries += 1
            while self._num_bytes > self._max_bytes:
                oldest = database.execute("SELECT name FROM answer ORDER BY used_at LIMIT 1").fetchone()
                if oldest is None:  # another process deletes from the same file
                    self._count(database)
                    break
                self._delete(database, oldest[0])

    def _delete(self, database: sqlite3.Connection, name: bytes) -> None:
        row = database.execute("DELETE FROM answer WHERE name = ? RETURNING length(body)", (name,)).fetchone()
        if row is not None:
            self._num_bytes -= row[0]
            self.num_entries -= 1

    def _count(self, database: sqlite3.Connection) -> None:
        self.num_entries, self._num_bytes = database.execute(
            "SELECT count(*), coalesce(sum(length(body)), 0) FROM answer"
        ).fetchone()

    # -- opening, and a file that is damaged ----------------------------------------------------------------

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            try:
                self._database = self._open()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                _log.warning("the file of kept answers is damaged", path=str(self._path), error=str(error))
                self._set_aside()
                self._database = self._open()
        return self._database

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # answers are nobody else's to read
        database = sqlite3.connect(self._path, check_same_thread=False, timeout=READ_SECONDS)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            found = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != ("ok",):
                raise sqlite3.DatabaseError(f"quick_check says: {found[0]}")
            database.executescript(_SCHEMA)
            with database:
                database.execute("DELETE FROM answer WHERE kept_at <= ?", (self._clock() - self._ttl_seconds,))
            self._count(database)
        except sqlite3.Error:
            database.close()
            raise
        weakref.finalize(self, database.close)
        return database

    def _set_aside(self) -> None:
        """Move the file to a name of its own, for whoever wants to look at it, and begin anew."""
        self._close()
        aside = self._path.with_name(f"{self._path.name}.damaged")
        for suffix in SIDE_FILES:
            with contextlib.suppress(OSError):
                os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
        _log.warning("the file of kept answers is set aside", path=str(aside))

    def _close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
        self._database = None
        self.num_entries = self._num_bytes = 0
