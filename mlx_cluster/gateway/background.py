"""Responses that nobody waits for: work that goes on after its request was answered.

Owns: the running tasks, by response id, their places among the gateway's requests, cancelling.
Does not own: what they do and store (``responses_routes``).
Invariant: a task's place is free when the task has ended, whatever ended it; nobody's exception is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any

from mlx_cluster import log
from mlx_cluster.gateway.answer import Gateway

_log = log.get("gateway")

CANCEL_SECONDS = 15.0


class Background:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def place(self) -> ExitStack:
        """A place for one task to come. Raises ``Overloaded``."""
        taken = ExitStack()
        taken.enter_context(self._gateway.place())
        return taken

    def start(self, id_: str, work: Coroutine[Any, Any, None], place: ExitStack) -> None:
        task = asyncio.create_task(work, name=id_)
        self._tasks[id_] = task

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.pop(id_, None)
            place.close()
            if not task.cancelled() and task.exception() is not None:
                _log.error("background response failed", response=id_, exc_info=task.exception())

        task.add_done_callback(ended)

    async def cancel(self, id_: str) -> None:
        """Return when this task, if there is one, has ended."""
        task = self._tasks.get(id_)
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_SECONDS)
