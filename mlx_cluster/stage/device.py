"""The one thread of a stage process that owns mlx.

Owns: the thread and its queue of jobs. Since mlx 0.31.2 arrays and streams belong to the thread that made them, so
loading, warming up, running microbatches and the mlx link's operations all happen here.
Does not own: what the jobs do.
Invariant: jobs run one at a time, in the order they were posted.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from mlx_cluster import log

T = TypeVar("T")
Job = Callable[[], None]

logger = log.get("stage.device")


class DeviceThread:
    """Made once per stage process. Jobs are posted from the event loop."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)
        self._thread.start()

    def post(self, job: Job) -> None:
        """Run ``job`` when its turn comes; it handles its own errors. Any thread may call this."""
        self._jobs.put(job)

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` there and give its result, or raise its exception, here."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  # raised again in the caller
                _in_loop(loop, _settle, answer, None, error)
            else:
                _in_loop(loop, _settle, answer, result, None)

        self.post(job)
        return await answer

    async def close(self, timeout_seconds: float) -> bool:
        """End the thread after the jobs before; False when it is still busy after ``timeout_seconds``."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a job of the mlx thread did not handle its own error")


def _in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending and nobody waits any more
        loop.call_soon_threadsafe(callback, *args)


def _settle(answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)
