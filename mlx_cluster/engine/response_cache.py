"""Answers of deterministic requests, given again without computing: a cache, and an engine in front of an engine.

Owns: what may be kept and under which name, the bound in bytes, age, the order of eviction, what is counted.
Does not own: the file (``response_file``), the computation.
Invariants: only whole generations are kept (``stop`` or ``length``), and only of requests whose tokens are settled by
themselves: greedy ones, and those to which the client gave a seed. A name holds the tenant, the model's fingerprint,
the prompt and every field that has a part in the tokens, so that nothing is ever given to another tenant, after another
model took the name, or for other sampling. A replay is the same events as the first time, its usage too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from mlx_cluster import log
from mlx_cluster._pb import engine_pb2
from mlx_cluster.engine.sharing import same_work
from mlx_cluster.errors import LinkMismatch
from mlx_cluster.request import Engine, Event, Finished, SequenceRequest
from mlx_cluster.wire import decode_event, encode_event, encode_sequence_request

_log = log.get("engine.response_cache")

# What the bookkeeping of one entry takes, beside its bytes.
ENTRY_OVERHEAD_BYTES = 256


class EntryFile(Protocol):
    """Keeps entries beyond the life of the node; ``response_file.ResponseFile`` is one. Never raises."""

    num_entries: int

    async def get(self, name: bytes) -> tuple[float, bytes] | None:
        """When it was kept, and its body."""
        ...

    def put(self, name: bytes, body: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    body: bytes
    kept_at: float
    scope: str

    @property
    def num_bytes(self) -> int:
        return len(self.body) + ENTRY_OVERHEAD_BYTES


class ResponseCache:
    """LRU by bytes, with an age limit; ``file`` is asked for what is not in memory. One serves all models of a node."""

    def __init__(
        self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float], file: EntryFile | None = None
    ) -> None:
        self._max_bytes, self._ttl_seconds, self._clock, self._file = max_bytes, ttl_seconds, clock, file
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._num_bytes = 0
        self._num_entries_of: Counter[str] = Counter()
        self._num_bytes_of: Counter[str] = Counter()
        self._num_evicted_of: Counter[str] = Counter()

    async def get(self, name: bytes, scope: str) -> bytes | None:
        """The body of an entry, from memory or file. ``scope`` is whom it counts for."""
        entry = self._entries.get(name)
        if entry is not None:
            if self._clock() - entry.kept_at < self._ttl_seconds:
                self._entries.move_to_end(name)
                return entry.body
            self._drop(name)
        found = await self._file.get(name) if self._file is not None else None
        if found is None:
            entry = self._entries.get(name)  # it may have been computed while the file was asked
            return entry.body if entry is not None else None
        kept_at, body = found
        self._remember(name, _Entry(body, kept_at, scope))
        return body

    def put(self, name: bytes, body: bytes, scope: str) -> None:
        self._remember(name, _Entry(body, self._clock(), scope))
        if self._file is not None and len(body) + ENTRY_OVERHEAD_BYTES <= self._max_bytes:
            self._file.put(name, body)

    def statistics(self, scope: str) -> dict[str, int]:
        figures = {
            "response_cache_entries": self._num_entries_of[scope],
            "response_cache_bytes": self._num_bytes_of[scope],
            "response_cache_evictions": self._num_evicted_of[scope],
        }
        if self._file is not None:
            figures["response_cache_file_entries"] = self._file.num_entries
        return figures

    def _remember(self, name: bytes, entry: _Entry) -> None:
        self._drop(name)
        if entry.num_bytes > self._max_bytes:
            return
        while self._num_bytes + entry.num_bytes > self._max_bytes:
            oldest = next(iter(self._entries))
            self._num_evicted_of[self._entries[oldest].scope] += 1
            self._drop(oldest)
        self._entries[name] = entry
        self._num_bytes += entry.num_bytes
        self._num_entries_of[entry.scope] += 1
        self._num_bytes_of[entry.scope] += entry.num_bytes

    def _drop(self, name: bytes) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes
            self._num_entries_of[entry.scope] -= 1
            self._num_bytes_of[entry.scope] -= entry.num_bytes


class CachingEngine:
    """Implements ``request.Engine`` in front of ``inner``. ``fingerprint`` changes whenever the model's weights do."""

    def __init__(self, inner: Engine, cache: ResponseCache, fingerprint: str, scope: str) -> None:
        self._inner, self._cache, self._fingerprint, self._scope = inner, cache, fingerprint, scope
        self._num_hits = self._num_misses = 0

    def statistics(self) -> dict[str, Any]:
        return {
            **self._cache.statistics(self._scope),
            "response_cache_hits": self._num_hits,
            "response_cache_misses": self._num_misses,
        }

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """See ``request.Engine``."""
        name = self._name(request)
        if name is None:
            async with contextlib.aclosing(self._inner.generate(request)) as events:
                async for event in events:
                    yield event
            return
        kept = await self._kept(name)
        if kept is not None:
            self._num_hits += 1
            for event in kept:
                yield event
            return
        self._num_misses += 1
        heard: list[Event] = []
        async with contextlib.aclosing(self._inner.generate(request)) as events:
            async for event in events:
                heard.append(event)
                if isinstance(event, Finished) and event.reason in ("stop", "length"):
                    self._cache.put(name, _encoded(heard), self._scope)
                yield event

    def _name(self, request: SequenceRequest) -> bytes | None:
        """The name of the request's answer; None where there is none to keep.

        Resumed work is not whole, and one that a client may attach to again is kept by whoever keeps those.
        """
        if not request.repeatable or request.emitted or request.key:
            return None
        message = encode_sequence_request(replace(same_work(request), model=self._fingerprint))
        return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()

    async def _kept(self, name: bytes) -> list[Event] | None:
        body = await self._cache.get(name, self._scope)
        if body is None:
            return None
        try:
            return [decode_event(event) for event in engine_pb2.SequenceEvents.FromString(body).events]
        except (DecodeError, LinkMismatch) as error:
            _log.warning("a kept answer cannot be read: it is computed again", error=str(error))
            return None


def _encoded(events: list[Event]) -> bytes:
    return engine_pb2.SequenceEvents(events=[encode_event(event) for event in events]).SerializeToString()
