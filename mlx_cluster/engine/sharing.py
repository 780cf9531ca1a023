"""Identical greedy requests that run at once are computed once: an engine in front of an engine.

Owns: which requests are the same work, the runs in progress, who listens to each.
Does not own: the computation (the engine behind it), what is kept of a run after its end (``response_cache``).
Invariants: every listener gets the run's events from its beginning, whenever it came; nobody's leaving ends a run that
somebody else listens to, and the last one's leaving cancels it. Requests of two tenants are never the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_cluster import log
from mlx_cluster.errors import ClusterError, Overloaded, Unavailable
from mlx_cluster.request import Engine, Event, Finished, SequenceRequest

_log = log.get("engine.sharing")

# How long closing the stream of a run may take before it is left to itself.
CLOSE_SECONDS = 5.0

_Key = tuple[SequenceRequest, int]


def same_work(request: SequenceRequest) -> SequenceRequest:
    """The request without what has no part in its tokens: two that are equal after this get the same tokens.

    The draw is keyed by seed and choice, so that both count unless it is greedy.
    """
    plain = replace(request, request_id="", priority=0, queue_seconds=None, speculate=None, key="", repeatable=False)
    if plain.sampling.temperature != 0:
        return plain
    return replace(plain, choice=0, sampling=replace(plain.sampling, seed=0))


@dataclass(slots=True, eq=False)
class _Run:
    """One computation: all that was heard of it, and a future that is done when there is more."""

    heard: list[Event | ClusterError] = field(default_factory=list)
    listeners: int = 0
    ended: bool = False
    more: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None

    async def at(self, position: int) -> Event | ClusterError:
        """What was heard at this place, as soon as it is."""
        while position >= len(self.heard):
            await asyncio.shield(self.more)
        return self.heard[position]

    def hear(self, event: Event | ClusterError) -> None:
        self.heard.append(event)
        self.ended = isinstance(event, Finished | ClusterError)
        more, self.more = self.more, asyncio.get_running_loop().create_future()
        more.set_result(None)


class SharingEngine:
    """Implements ``request.Engine`` in front of ``inner``."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self._runs: dict[_Key, _Run] = {}
        self._num_joined = 0

    def statistics(self) -> dict[str, Any]:
        return {"shared": self._num_joined, "shared_runs": len(self._runs)}

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """See ``request.Engine``."""
        if not _may_share(request):
            async with contextlib.aclosing(self._inner.generate(request)) as events:
                async for event in events:
                    yield event
            return
        # A priority is part of what is shared: a request must not wait behind others for having joined a lesser one.
        key = (same_work(request), request.priority)
        came_at = asyncio.get_running_loop().time()
        while True:
            run, joined = self._join(key, request, came_at)
            try:
                position = 0
                while True:
                    heard = await run.at(position)
                    if isinstance(heard, Overloaded) and joined and position == 0:
                        break  # whom it joined was refused or lost patience; this one still has its own
                    if isinstance(heard, ClusterError):
                        raise copy.copy(heard)  # each listener adds its own traceback
                    position += 1
                    yield heard
                    if isinstance(heard, Finished):
                        return
            finally:
                run.listeners -= 1
                if not run.listeners:
                    await self._leave(key, run)

    def _join(self, key: _Key, request: SequenceRequest, came_at: float) -> tuple[_Run, bool]:
        """The run of this work, and whether somebody else had begun it."""
        run = self._runs.get(key)
        joined = run is not None
        if run is None:
            run = self._runs[key] = _Run()
            mine = _with_patience_left(request, came_at)
            run.task = asyncio.create_task(self._compute(key, run, mine), name=f"shared {request.request_id}")
        run.listeners += 1
        self._num_joined += joined
        return run, joined

    async def _compute(self, key: _Key, run: _Run, request: SequenceRequest) -> None:
        """Carry the computation into ``run``; cancelling this ends it."""
        try:
            async with contextlib.aclosing(self._inner.generate(request)) as events:
                async for event in events:
                    run.hear(event)
            if not run.ended:
                run.hear(Unavailable("the engine's stream ended early: send the request again"))
        except ClusterError as error:
            run.hear(error)
        except Exception as error:  # noqa: BLE001 - this task's root
            _log.exception("shared run failed", request=request.request_id)
            run.hear(ClusterError(repr(error)))
        finally:
            # A whole run may still be joined, and is forgotten with its last listener; a failed one may not.
            if not run.heard or not isinstance(run.heard[-1], Finished):
                self._forget(key, run)

    async def _leave(self, key: _Key, run: _Run) -> None:
        """Nobody listens any more: nobody may join either, and the engine hears it before this returns."""
        self._forget(key, run)
        if run.task is not None and not run.task.done():
            run.task.cancel()
            _, late = await asyncio.wait({run.task}, timeout=CLOSE_SECONDS)
            if late:
                _log.warning("the engine's stream does not close", request=run.task.get_name())

    def _forget(self, key: _Key, run: _Run) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]


def _may_share(request: SequenceRequest) -> bool:
    """Greedy, from its beginning, and nobody's to attach to: those are held beyond their listeners' leaving."""
    return request.sampling.temperature == 0 and not request.emitted and not request.key


def _with_patience_left(request: SequenceRequest, came_at: float) -> SequenceRequest:
    if request.queue_seconds is None:
        return request
    waited = asyncio.get_running_loop().time() - came_at
    return replace(request, queue_seconds=max(0.0, request.queue_seconds - waited))
