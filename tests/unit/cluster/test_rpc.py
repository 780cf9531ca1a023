from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.rpc import ClusterClient, ClusterService, HeartbeatThread, open_channel
from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.errors import (
    ClusterError,
    ConfigError,
    DeadlineExceeded,
    Fenced,
    LinkUnavailable,
    StageStartError,
    Unavailable,
)
from mlx_cluster.plan import Epoch, Plan
from tests.unit.cluster.builders import VERSION, plan, status


class Handler:
    """Answers by what it is asked, and notes what it heard."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[NodeStatus] = asyncio.Queue()
        self.documents: list[ClusterDocument] = []
        self.stopped: list[tuple[str, int, Epoch, str]] = []

    def heartbeat(self, value: NodeStatus) -> NodeStatus:
        self.heard.put_nowait(value)
        return status(1, name="answering")

    async def put_document(self, document: ClusterDocument) -> None:
        if document.term == 0:
            raise Fenced("newer here")
        self.documents.append(document)

    async def start_stage(
        self, value: Plan, index: int, epoch: Epoch, fresh: bool
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        yield cluster_pb2.StageProgress(state="loading", done_bytes=1, total_bytes=2)
        if index == 1:
            raise StageStartError(f"{value.pipeline} {epoch} does not load")
        yield cluster_pb2.StageProgress(state="loaded", address="127.0.0.1:1")

    async def link_stage(self, request: cluster_pb2.LinkStageRequest) -> None:
        if request.transport == "ring":
            raise LinkUnavailable("no ring today")
        if request.transport == "never":
            await asyncio.Event().wait()

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        self.stopped.append((pipeline, index, epoch, reason))


@asynccontextmanager
async def serving(cluster: str = "c") -> AsyncIterator[tuple[Handler, str, ClusterClient]]:
    handler = Handler()
    server = grpc.aio.server()
    ClusterService(handler, "c", VERSION).add_to(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with open_channel(address) as channel:
        yield handler, address, ClusterClient(channel, cluster, "mini1")
    await server.stop(None)


async def test_documents_arrive_and_refusals_keep_their_type() -> None:
    async with serving() as (handler, _, client):
        document = ClusterDocument("c", 1, 2, plans=(plan({0: 3}),))
        await client.put_document(document)
        assert handler.documents == [document]
        with pytest.raises(Fenced, match="newer here"):
            await client.put_document(ClusterDocument("c"))


async def test_another_cluster_is_refused_by_name() -> None:
    async with serving(cluster="other") as (_, _, client):
        with pytest.raises(ConfigError, match="'other' called a node of 'c'"):
            await client.put_document(ClusterDocument("other", 1))
        with pytest.raises(ConfigError, match="'other' called a node of 'c'"):
            async for _ in client.start_stage(plan({0: 3}), 0, Epoch(1, 1), False, 10.0):
                pass


async def test_a_stage_start_streams_progress_and_ends_loaded_or_with_its_error() -> None:
    async with serving() as (_, _, client):
        states = [p.state async for p in client.start_stage(plan({0: 3}), 0, Epoch(1, 1), False, 10.0)]
        assert states == ["loading", "loaded"]
        with pytest.raises(StageStartError, match=r"tiny 1\.1 does not load"):
            async for _ in client.start_stage(plan({0: 3, 1: 3}), 1, Epoch(1, 1), False, 10.0):
                pass


async def test_links_and_stops() -> None:
    async with serving() as (handler, _, client):
        await client.link_stage(cluster_pb2.LinkStageRequest(transport="grpc"), 10.0)
        with pytest.raises(LinkUnavailable, match="no ring"):
            await client.link_stage(cluster_pb2.LinkStageRequest(transport="ring"), 10.0)
        with pytest.raises(DeadlineExceeded, match="mini1 did not answer"):
            await client.link_stage(cluster_pb2.LinkStageRequest(transport="never"), 0.2)
        await client.stop_stage("tiny", 2, Epoch(3, 4), "why")
        assert handler.stopped == [("tiny", 2, Epoch(3, 4), "why")]


async def test_nobody_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:9") as channel:
        with pytest.raises((Unavailable, DeadlineExceeded), match="mini9"):
            await ClusterClient(channel, "c", "mini9").put_document(ClusterDocument("c", 1))


class Beats:
    """A heartbeat thread to one peer, and what comes back."""

    def __init__(self, address: str, version: str = VERSION, interval: float = 0.05, stale: float = 60.0) -> None:
        self.statuses: asyncio.Queue[NodeStatus] = asyncio.Queue()
        self.refusals: asyncio.Queue[tuple[int, ClusterError]] = asyncio.Queue()
        self.unreachable: asyncio.Queue[int] = asyncio.Queue()
        self.now = 0.0
        self.peers = {1: address}
        self.thread = HeartbeatThread(
            self.peers,
            "c",
            version,
            interval,
            on_status=self.statuses.put_nowait,
            on_refusal=lambda node, error: self.refusals.put_nowait((node, error)),
            on_unreachable=self.unreachable.put_nowait,
            max_stale_seconds=stale,
            clock=lambda: self.now,
        )


async def test_heartbeats_carry_statuses_both_ways() -> None:
    async with serving() as (handler, address, _):
        beats = Beats(address)
        beats.thread.publish(status(0, sequence=7))
        beats.thread.start()
        try:
            assert await asyncio.wait_for(handler.heard.get(), 30) == status(0, sequence=7)
            assert (await asyncio.wait_for(beats.statuses.get(), 30)).name == "answering"
        finally:
            await asyncio.to_thread(beats.thread.stop)


async def test_a_published_status_may_leave_at_once() -> None:
    async with serving() as (handler, address, _):
        beats = Beats(address, interval=1000.0)
        beats.thread.publish(status(0, sequence=1))
        beats.thread.start()
        try:
            await asyncio.wait_for(handler.heard.get(), 30)
            beats.thread.publish(status(0, sequence=2), at_once=True)
            assert (await asyncio.wait_for(handler.heard.get(), 30)).sequence == 2
        finally:
            await asyncio.to_thread(beats.thread.stop)


async def test_a_refused_version_reaches_the_caller_with_both_versions() -> None:
    async with serving() as (_, address, _):
        beats = Beats(address, version="mlx-cluster 9")
        beats.thread.publish(status(0))
        beats.thread.start()
        try:
            node, error = await asyncio.wait_for(beats.refusals.get(), 30)
        finally:
            await asyncio.to_thread(beats.thread.stop)
        assert node == 1
        assert isinstance(error, ConfigError)
        assert VERSION in str(error)
        assert "mlx-cluster 9" in str(error)


async def heard_within(handler: Handler, seconds: float) -> bool:
    try:
        await asyncio.wait_for(handler.heard.get(), seconds)
    except TimeoutError:
        return False
    return True


async def test_a_busy_loop_still_beats_and_a_frozen_one_does_not() -> None:
    async with serving() as (handler, address, _):
        beats = Beats(address, stale=10.0)
        beats.thread.publish(status(0))
        beats.thread.start()
        try:
            await asyncio.wait_for(handler.heard.get(), 30)
            time.sleep(0.3)  # noqa: ASYNC251  # the loop is busy; the thread must go on
            await asyncio.wait_for(handler.heard.get(), 30)
            await asyncio.wait_for(handler.heard.get(), 30)
            beats.now = 11.0
            while await heard_within(handler, 0.5):
                pass
        finally:
            await asyncio.to_thread(beats.thread.stop)


async def test_heartbeats_follow_the_address_that_is_dialled() -> None:
    async with serving() as (handler, address, _):
        beats = Beats("127.0.0.1:9")
        beats.thread.publish(status(0, sequence=7))
        beats.thread.start()
        try:
            beats.peers[1] = address
            assert (await asyncio.wait_for(handler.heard.get(), 30)).sequence == 7
        finally:
            await asyncio.to_thread(beats.thread.stop)


async def test_a_peer_without_a_connection_is_told_and_hurry_does_not_wait_for_the_interval() -> None:
    beats = Beats("127.0.0.1:9", interval=1000.0)
    beats.thread.publish(status(0))
    beats.thread.start()
    try:
        for _ in range(2):
            assert await asyncio.wait_for(beats.unreachable.get(), 30) == 1
            beats.thread.hurry()
    finally:
        await asyncio.to_thread(beats.thread.stop)
    assert beats.statuses.empty()


class FlakyHandler(Handler):
    """Its server breaks the first ``num_broken`` calls."""

    def __init__(self, num_broken: int) -> None:
        super().__init__()
        self.num_broken, self.asked = num_broken, 0


class Breaking(grpc.aio.ServerInterceptor):
    def __init__(self, handler: FlakyHandler) -> None:
        self._handler = handler

    async def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
        self._handler.asked += 1
        if self._handler.asked > self._handler.num_broken:
            return await continuation(details)

        async def broken(_request: object, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")

        return grpc.unary_unary_rpc_method_handler(broken)


async def test_documents_and_stops_are_sent_again_and_links_are_not() -> None:
    handler = FlakyHandler(0)
    server = grpc.aio.server(interceptors=(Breaking(handler),))
    ClusterService(handler, "c", VERSION).add_to(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with open_channel(address) as channel:
        client = ClusterClient(channel, "c", "mini1")
        handler.num_broken = 2
        await client.put_document(ClusterDocument("c", 1))
        assert (handler.asked, len(handler.documents)) == (3, 1)
        handler.asked, handler.num_broken = 0, 1
        await client.stop_stage("tiny", 2, Epoch(3, 4), "why")
        assert (handler.asked, len(handler.stopped)) == (2, 1)
        handler.asked, handler.num_broken = 0, 1
        with pytest.raises(Unavailable, match="mini1 cannot be reached"):
            await client.link_stage(cluster_pb2.LinkStageRequest(transport="grpc"), 10.0)
        assert handler.asked == 1
    await server.stop(None)
