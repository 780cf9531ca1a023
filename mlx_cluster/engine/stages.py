"""The engine's ordered stream to one stage process.

Owns: one gRPC ``Stage.Run`` call per stage and epoch, a bounded outbox with its own task (one full window never stops
the other stages), the ticks that show a frozen stage.
Does not own: what is sent (``engine.scheduler``).
Invariant: headers leave in the order they were put; after ``on_lost`` nothing else is called.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from mlx_cluster import log
from mlx_cluster._pb import stage_pb2
from mlx_cluster.errors import StageStartError
from mlx_cluster.microbatch import Held, Report, Saved
from mlx_cluster.plan import Plan
from mlx_cluster.wire import GRPC_OPTIONS, decode_report, decode_saved_entries

_log = log.get("engine.stages")

RUN_METHOD = "/mlx_cluster.Stage/Run"
TICK_SECONDS = 1.0
_TICK = stage_pb2.EngineMessage(tick=stage_pb2.Tick()).SerializeToString()


class StageStream:
    """Headers to, and reports from, one stage. All callbacks run in the engine's loop."""

    def __init__(
        self,
        index: int,
        address: str,
        plan: Plan,
        epoch: str,
        *,
        capacity: int,
        on_report: Callable[[Report], None],
        on_lost: Callable[[int, str], None],
    ) -> None:
        self.index = index
        self.address = address
        self._metadata = (("epoch", epoch), ("plan-hash", plan.hash()), ("pipeline", plan.pipeline))
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(capacity)
        self._on_report = on_report
        self._on_lost = on_lost
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None
        self._heard = asyncio.Event()
        self._heard_at = 0.0
        self._saved: asyncio.Future[tuple[Saved, ...]] = asyncio.get_running_loop().create_future()
        self._closing = False
        self.held: Held | None = None  # what the stage said last that it holds

    async def open(self, timeout_seconds: float) -> None:
        """Open the stream and wait for the stage's first tick. Raises ``StageStartError``."""
        self._channel = grpc.aio.insecure_channel(self.address, options=GRPC_OPTIONS)
        call = self._channel.stream_stream(
            RUN_METHOD, request_serializer=None, response_deserializer=stage_pb2.StageMessage.FromString
        )(metadata=self._metadata, wait_for_ready=True)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._write(call), name=f"stage {self.index} headers"),
            loop.create_task(self._read(call), name=f"stage {self.index} reports"),
        ]
        self._outbox.put_nowait(_TICK)
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._heard.wait()
        except TimeoutError:
            raise StageStartError(
                f"stage {self.index} at {self.address} did not answer the engine within {timeout_seconds:g} s"
            ) from None

    def put(self, header: bytes) -> None:
        """Queue one serialized ``EngineMessage``; the credits bound what can be waiting."""
        self._outbox.put_nowait(header)

    async def saved(self, timeout_seconds: float) -> tuple[Saved, ...]:
        """The entries on the stage's disk, which it names first. Raises ``StageStartError`` when it does not."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._saved), timeout_seconds)
        except TimeoutError:
            raise StageStartError(
                f"stage {self.index} at {self.address} did not say within {timeout_seconds:g} s what is on its disk"
            ) from None

    @property
    def opened(self) -> bool:
        """Whether the stage has answered at all."""
        return self._heard.is_set()

    def silent_seconds(self, now: float) -> float:
        """How long the stage has said nothing, by the loop's clock."""
        return now - self._heard_at

    def tick(self) -> None:
        if not self._outbox.full():
            self._outbox.put_nowait(_TICK)

    async def close(self) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._channel is not None:
            await self._channel.close()

    async def _write(self, call: Any) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._lost(f"headers cannot be sent: {_detail(error)}")

    async def _read(self, call: AsyncIterator[stage_pb2.StageMessage]) -> None:
        loop = asyncio.get_running_loop()
        reason = "the stage closed its stream"
        try:
            async for message in call:
                self._heard_at = loop.time()
                self._heard.set()
                match message.WhichOneof("kind"):
                    case "tick" if message.tick.HasField("held"):
                        self.held = Held(message.tick.held.rows, message.tick.held.entries)
                    case "report":
                        self._on_report(decode_report(message.report))
                    case "saved":
                        self._saved.set_result(decode_saved_entries(message.saved))
                    case "failure":
                        reason = f"{message.failure.code}: {message.failure.message}"
                        break
        except grpc.aio.AioRpcError as error:
            reason = _detail(error)
        self._lost(reason)

    def _lost(self, reason: str) -> None:
        if not self._closing:
            self._closing = True
            _log.warning("stage stream lost", stage=self.index, address=self.address, reason=reason)
            self._on_lost(self.index, reason)


def _detail(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return f"{type(error).__name__}: {error}"
