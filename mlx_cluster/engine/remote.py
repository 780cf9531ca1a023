"""An engine on another node, over gRPC: the service that offers local engines, and the client that is one.

Invariant: cancelling the call (closing the generator, a dead gateway) cancels the sequence on every stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc

from mlx_cluster import log
from mlx_cluster._pb import engine_pb2
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

    async def _generate(
        self, message: engine_pb2.SequenceRequest, context: Any
    ) -> AsyncIterator[engine_pb2.SequenceEvent]:
        request = decode_sequence_request(message)
        pipeline = dict(context.invocation_metadata())["pipeline"]
        try:
            async with contextlib.aclosing(self._resolve(pipeline).generate(request)) as events:
                async for event in events:
                    yield encode_event(event)
        except ClusterError as error:
            yield encode_failure(error)


class RemoteEngine:
    """Implements ``request.Engine`` for one pipeline through an open channel to its engine's node."""

    def __init__(self, channel: grpc.aio.Channel, pipeline: str) -> None:
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
        try:
            async for message in call:
                event = decode_event(message)
                admitted = True
                yield event
                if isinstance(event, Finished):
                    return
        except grpc.aio.AioRpcError as error:
            reason = f"the engine's node cannot be reached ({error.code().name.lower()}: {error.details()})"
            raise (StageLost if admitted else Recovering)(reason) from error
        finally:
            call.cancel()
        raise StageLost("the engine's node closed the stream without an end")
