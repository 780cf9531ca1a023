"""Stages without a model at the real seam: gRPC servers that take headers and report scripted tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from mlx_cluster._pb import stage_pb2
from mlx_cluster.microbatch import FailedRow, Kind, Microbatch, Report, Sampled
from mlx_cluster.wire import decode_microbatch, encode_report


def scripted_token(row: int, index: int) -> int:
    return (row * 31 + index * 7) % 500


class FakeStage:
    """Reports every microbatch at once, unless ``hold`` is cleared; the last stage draws ``scripted_token``."""

    def __init__(self, index: int, last: bool) -> None:
        self.index, self.last = index, last
        self.headers: list[Microbatch] = []
        self.metadata: dict[str, str] = {}
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.fail_with: stage_pb2.StageFailure | None = None
        self.bad_tokens: frozenset[int] = frozenset()
        self.held: stage_pb2.Held | None = None
        self.address = ""
        self._drawn: dict[int, int] = {}
        self._server = grpc.aio.server()

    async def start(self) -> FakeStage:
        handler = grpc.stream_stream_rpc_method_handler(
            self._run,
            request_deserializer=stage_pb2.EngineMessage.FromString,
            response_serializer=stage_pb2.StageMessage.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mlx_cluster.Stage", {"Run": handler}),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _run(
        self, messages: AsyncIterator[stage_pb2.EngineMessage], context: Any
    ) -> AsyncIterator[stage_pb2.StageMessage]:
        self.metadata = dict(context.invocation_metadata())
        async for message in messages:
            if message.WhichOneof("kind") == "tick":
                yield stage_pb2.StageMessage(tick=stage_pb2.Tick(held=self.held))
                continue
            header = decode_microbatch(message.microbatch)
            self.headers.append(header)
            await self.go_on.wait()
            if self.fail_with is not None:
                yield stage_pb2.StageMessage(failure=self.fail_with)
                return
            yield stage_pb2.StageMessage(report=encode_report(self._report(header)))

    def _report(self, header: Microbatch) -> Report:
        failed = []
        if header.kind is Kind.PREFILL and self.bad_tokens & set(header.tokens):
            failed = [FailedRow(header.rows[0], "token is not in the vocabulary")]
        sampled = []
        if self.last and header.sample and not failed:
            for row in header.rows:
                index = self._drawn.get(row, 0)
                self._drawn[row] = index + 1
                sampled.append(Sampled(row, scripted_token(row, index)))
        return Report(header.id, self.index, 0.001, 0.0, 0, tuple(sampled), tuple(failed))
