"""An engine on another node, over gRPC: the service that offers local engines, and the client that is one.

Owns: that a frozen node is noticed: the service ticks on every stream, the client gives up one that is silent.
Invariant: cancelling the call (closing the generator, a dead gateway) cancels the sequence on every stage.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from mlx_cluster import log
from mlx_cluster._pb import engine_pb2, stage_pb2
from mlx_cluster.errors import ClusterError, Recovering, StageLost
from mlx_cluster.request import Engine, Event, Finished, SequenceRequest
from mlx_cluster.wire import (
    decode_event,
    decode_sequence_request,
    encode_event,
    encode_failure,
    encode_sequence_request,
)

_log = log.get("engine.remote")

SERVICE = "mlx_cluster.Engine"
TICK_SECONDS = 1.0
# An engine's node that says nothing for so long is frozen or cut off. TCP would tell minutes later.
SILENCE_SECONDS = 4.0
_TICK = engine_pb2.SequenceEvent(tick=stage_pb2.Tick())


class EngineService:
    """Serves this node's engines; ``resolve`` gives the engine of a pipeline or raises ``Unavailable``."""

    def __init__(self, resolve: Callable[[str], Engine]) -> None:
        self._resolve = resolve

    def add_to(self, server: grpc.aio.Server) -> None:
        handler = grpc.unary_stream_rpc_method_handler(
            self._generate,
            request_deserializer=engine_pb2.SequenceRequest.FromString,
            response_serializer=engine_pb2.SequenceEvent.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Generate": handler}),))

    async def _generate(self, message: engine_pb2.SequenceRequest, context: Any) -> None:
        request = decode_sequence_request(message)
        pipeline = dict(context.invocation_metadata())["pipeline"]
        order = asyncio.Lock()

        async def say(event: engine_pb2.SequenceEvent) -> None:
            async with order:  # one write at a time
                await context.write(event)

        ticks = asyncio.create_task(_tick(say), name="engine stream ticks")
        try:
            async with contextlib.aclosing(self._resolve(pipeline).generate(request)) as events:
                async for event in events:
                    await say(encode_event(event))
        except ClusterError as error:
            await say(encode_failure(error))
        finally:
            ticks.cancel()
            await asyncio.wait([ticks])


async def _tick(say: Callable[[engine_pb2.SequenceEvent], Coroutine[Any, Any, None]]) -> None:
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):  # the stream is over
        while True:
            await say(_TICK)
            await asyncio.sleep(TICK_SECONDS)


@dataclass(slots=True)
class _Watch:
    """When the other end was heard last, and whether it was given up for its silence."""

    heard_at: float
    reading: bool = True
    gave_up: bool = False


class RemoteEngine:
    """Implements ``request.Engine`` for one pipeline through an open channel to its engine's node."""

    def __init__(self, channel: grpc.aio.Channel, pipeline: str, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._silence_seconds = silence_seconds
        self._metadata = (("pipeline", pipeline),)
        self._generate = channel.unary_stream(
            f"/{SERVICE}/Generate",
            request_serializer=engine_pb2.SequenceRequest.SerializeToString,
            response_deserializer=engine_pb2.SequenceEvent.FromString,
        )

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """See ``request.Engine``. A broken connection is ``StageLost`` once admitted, ``Recovering`` before."""
        call = self._generate(encode_sequence_request(request), metadata=self._metadata)
        admitted = False
        watch = _Watch(asyncio.get_running_loop().time())
        try:
            with _watched(call, watch, self._silence_seconds):
                async for message in call:
                    watch.heard_at = asyncio.get_running_loop().time()
                    if message.HasField("tick"):
                        continue
                    event = decode_event(message)
                    admitted = True
                    watch.reading = False  # how long the caller takes is not the other end's silence
                    yield event
                    watch.reading, watch.heard_at = True, asyncio.get_running_loop().time()
                    if isinstance(event, Finished):
                        return
        except grpc.aio.AioRpcError as error:
            reason = f"the engine's node cannot be reached ({error.code().name.lower()}: {error.details()})"
            raise (StageLost if admitted else Recovering)(reason) from error
        except asyncio.CancelledError:
            # gRPC says it that way too when the call was given up under a waiting read.
            if not watch.gave_up or _this_task_is_cancelled():
                raise
            reason = f"the engine's node has been silent for {self._silence_seconds:g} s"
            raise (StageLost if admitted else Recovering)(reason) from None
        finally:
            call.cancel()
        raise StageLost("the engine's node closed the stream without an end")


@contextmanager
def _watched(call: Any, watch: _Watch, silence_seconds: float) -> Generator[None]:
    """Cancel the call once nothing was heard for ``silence_seconds``."""
    loop = asyncio.get_running_loop()

    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer
        left = watch.heard_at + silence_seconds - loop.time() if watch.reading else silence_seconds
        if left <= 0:
            watch.gave_up = True
            call.cancel()
        else:
            timer = loop.call_later(left, look)

    timer = loop.call_later(silence_seconds, look)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _this_task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
