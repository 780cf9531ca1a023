"""The agents' conversation over gRPC: the ``Cluster`` service, its client, and the thread that sends heartbeats.

Owns: method names, deadlines, and how typed errors cross. Does not own: what the answers are (``ClusterHandler``).
Invariant: every call has a deadline; every failure is a ``ClusterError``; heartbeats leave from their own thread, so
that an agent whose event loop is busy with templates or schemas does not look dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any, Protocol

import grpc

from mlx_cluster import log
from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.guarded import GuardedCalls
from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.errors import ClusterError, ConfigError, DeadlineExceeded, Unavailable
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.wire import GRPC_OPTIONS, error_from_code

_log = log.get(__name__)

SERVICE = "mlx_cluster.Cluster"
CALL_SECONDS = 5.0
STOP_SECONDS = 10.0  # an agent may need this long to kill a stage process and reap it

_UNARY: dict[str, tuple[Any, Any]] = {
    "Heartbeat": (cluster_pb2.HeartbeatRequest, cluster_pb2.HeartbeatReply),
    "PutDocument": (cluster_pb2.DocumentMessage, cluster_pb2.Ack),
    "LinkStage": (cluster_pb2.LinkStageRequest, cluster_pb2.Ack),
    "StopStage": (cluster_pb2.StopStageRequest, cluster_pb2.Ack),
    "Vote": (cluster_pb2.VoteMessage, cluster_pb2.Ack),
}


class ClusterHandler(Protocol):
    """What a node answers. Any method may raise a ``ClusterError``; it crosses by its code."""

    def heartbeat(self, status: NodeStatus) -> NodeStatus: ...

    async def put_document(self, document: ClusterDocument) -> None: ...

    def start_stage(
        self, plan: Plan, index: int, epoch: Epoch, fresh: bool
    ) -> AsyncGenerator[cluster_pb2.StageProgress]: ...

    async def link_stage(self, request: cluster_pb2.LinkStageRequest) -> None: ...

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None: ...

    def vote(self, message: Message) -> None:
        """Take in what another voter says; the answer, if any, is a message of its own."""
        ...


# -- the answering side ------------------------------------------------------------------------------


class ClusterService:
    """Puts a ``ClusterHandler`` on a grpc.aio server. ``cluster`` and ``version`` must be the caller's own."""

    def __init__(self, handler: ClusterHandler, cluster: str, version: str) -> None:
        self._handler, self._cluster, self._version = handler, cluster, version

    def add_to(self, server: grpc.aio.Server) -> None:
        answers = {
            "Heartbeat": self._heartbeat,
            "PutDocument": self._put_document,
            "LinkStage": self._link_stage,
            "StopStage": self._stop_stage,
            "Vote": self._vote,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                answers[name], request_deserializer=request.FromString, response_serializer=reply.SerializeToString
            )
            for name, (request, reply) in _UNARY.items()
        }
        handlers["StartStage"] = grpc.unary_stream_rpc_method_handler(
            self._start_stage,
            request_deserializer=cluster_pb2.StartStageRequest.FromString,
            response_serializer=cluster_pb2.StageProgress.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _heartbeat(self, message: cluster_pb2.HeartbeatRequest, context: Any) -> cluster_pb2.HeartbeatReply:
        try:
            self._check_cluster(message.cluster)
            if message.version != self._version:
                raise ConfigError(
                    f"this node runs {self._version}, node {message.node_id} runs {message.version}: "
                    "install the same versions on every node"
                )
            status = self._handler.heartbeat(_status_from_text(message.status_json))
        except ClusterError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}: {error}")
            raise  # abort never returns; this line tells the type checker
        return cluster_pb2.HeartbeatReply(node_id=status.node_id, status_json=status_to_text(status))

    async def _put_document(self, message: cluster_pb2.DocumentMessage, _context: Any) -> cluster_pb2.Ack:
        async def answer() -> None:
            self._check_cluster(message.cluster)
            await self._handler.put_document(ClusterDocument.from_text(message.document_json))

        return await _ack(answer())

    async def _link_stage(self, message: cluster_pb2.LinkStageRequest, _context: Any) -> cluster_pb2.Ack:
        return await _ack(self._handler.link_stage(message))

    async def _stop_stage(self, message: cluster_pb2.StopStageRequest, _context: Any) -> cluster_pb2.Ack:
        return await _ack(
            self._handler.stop_stage(message.pipeline, message.stage, Epoch.parse(message.epoch), message.reason)
        )

    async def _vote(self, message: cluster_pb2.VoteMessage, _context: Any) -> cluster_pb2.Ack:
        async def answer() -> None:
            self._check_cluster(message.cluster)
            try:
                said = Message.from_text(message.message_json)
            except ValueError as error:
                raise ConfigError(f"{error}: install the same version everywhere") from error
            self._handler.vote(said)

        return await _ack(answer())

    async def _start_stage(
        self, message: cluster_pb2.StartStageRequest, _context: Any
    ) -> AsyncIterator[cluster_pb2.StageProgress]:
        try:
            self._check_cluster(message.cluster)
            plan = Plan.from_json(json.loads(message.plan_json))
            starting = self._handler.start_stage(plan, message.stage, Epoch.parse(message.epoch), message.fresh)
            async with contextlib.aclosing(starting):  # a caller that leaves ends the start
                async for progress in starting:
                    yield progress
        except ClusterError as error:
            yield cluster_pb2.StageProgress(state="failed", code=error.code, message=str(error))

    def _check_cluster(self, cluster: str) -> None:
        if cluster != self._cluster:
            raise ConfigError(
                f"a node of cluster {cluster!r} called a node of {self._cluster!r}: "
                "check cluster.name and the addresses in cluster.yaml"
            )


async def _ack(answer: Any) -> cluster_pb2.Ack:
    try:
        await answer
    except ClusterError as error:
        return cluster_pb2.Ack(ok=False, code=error.code, message=str(error))
    return cluster_pb2.Ack(ok=True)


# -- the asking side ---------------------------------------------------------------------------------


class ClusterClient:
    """One other node's agent. The channel connects by itself and again after a loss.

    ``guard`` is what is known of the peer beyond this client. A document and a stop may arrive twice, so they are sent
    again; to start or link a stage is one attempt of its epoch, which the pipeline's driver repeats under the next one.
    """

    def __init__(self, channel: grpc.aio.Channel, cluster: str, name: str, guard: GuardedCalls | None = None) -> None:
        self._cluster, self._name, self._guard = cluster, name, guard or GuardedCalls(name)
        self._calls = {
            method: channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=request.SerializeToString,
                response_deserializer=reply.FromString,
            )
            for method, (request, reply) in _UNARY.items()
        }
        self._start = channel.unary_stream(
            f"/{SERVICE}/StartStage",
            request_serializer=cluster_pb2.StartStageRequest.SerializeToString,
            response_deserializer=cluster_pb2.StageProgress.FromString,
        )

    async def put_document(self, document: ClusterDocument) -> None:
        """Raises what the receiver's ``document.accept`` raises, or ``Unavailable``."""
        message = cluster_pb2.DocumentMessage(cluster=self._cluster, document_json=document.to_text())
        await self._acked("PutDocument", message, CALL_SECONDS, idempotent=True)

    async def start_stage(
        self, plan: Plan, index: int, epoch: Epoch, fresh: bool, timeout_seconds: float
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        """Progress until ``loaded``. Raises the error of the stage's agent, or ``Unavailable``."""
        request = cluster_pb2.StartStageRequest(
            cluster=self._cluster, plan_json=json.dumps(plan.to_json()), stage=index, epoch=str(epoch), fresh=fresh
        )
        failure: cluster_pb2.StageProgress | None = None
        with self._guard.passing():
            call = self._start(request, timeout=timeout_seconds)
            try:
                async for progress in call:
                    self._guard.heard("a stage there makes progress")
                    if progress.state == "failed":
                        failure = progress
                        break
                    yield progress
            except grpc.aio.AioRpcError as error:
                raise self._typed(error) from error
            finally:
                call.cancel()
        if failure is not None:
            raise error_from_code(failure.code, failure.message)

    async def link_stage(self, request: cluster_pb2.LinkStageRequest, timeout_seconds: float) -> None:
        await self._acked("LinkStage", request, timeout_seconds)

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        request = cluster_pb2.StopStageRequest(pipeline=pipeline, stage=index, epoch=str(epoch), reason=reason)
        await self._acked("StopStage", request, STOP_SECONDS, idempotent=True)

    async def _acked(self, method: str, request: Any, timeout_seconds: float, *, idempotent: bool = False) -> None:
        async def attempt(seconds: float) -> Any:
            try:
                return await self._calls[method](request, timeout=seconds)
            except grpc.aio.AioRpcError as error:
                raise self._typed(error) from error

        ack = await self._guard.call(attempt, timeout_seconds, idempotent=idempotent)
        if not ack.ok:
            raise error_from_code(ack.code, ack.message)

    def _typed(self, error: grpc.aio.AioRpcError) -> ClusterError:
        return _typed(self._name, error.code(), error.details() or "")


def _typed(name: str, code: grpc.StatusCode, details: str) -> ClusterError:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{name} did not answer in time")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        own_code, _, text = details.partition(": ")
        return error_from_code(own_code, text)
    return Unavailable(f"{name} cannot be reached ({code.name.lower()}: {details})")


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


# gRPC waits up to two minutes before it dials a lost address again; a node that came back must be met within seconds.
CHANNEL_OPTIONS = [
    *GRPC_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


# -- heartbeats --------------------------------------------------------------------------------------


def status_to_text(status: NodeStatus) -> str:
    return json.dumps(status.to_json())


def _status_from_text(text: str) -> NodeStatus:
    try:
        return NodeStatus.from_json(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a heartbeat that cannot be read ({error!r}): install the same version everywhere"
        ) from error


class HeartbeatThread:
    """Sends the latest status to every peer once per interval, from a thread of its own.

    The event loop publishes statuses; when it has not done so for ``max_stale_seconds`` the agent is frozen and the
    heartbeats stop, so that a dead loop is not kept alive by a living thread. Answers arrive in the loop, and so does
    the news of a peer that no connection leads to.
    """

    def __init__(
        self,
        peers: Mapping[int, str],
        cluster: str,
        version: str,
        interval_seconds: float,
        *,
        on_status: Callable[[NodeStatus], None],
        on_refusal: Callable[[int, ClusterError], None],
        on_unreachable: Callable[[int], None],
        max_stale_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._peers, self._cluster, self._version = peers, cluster, version
        self._interval, self._max_stale_seconds = interval_seconds, max_stale_seconds
        self._on_status, self._on_refusal, self._on_unreachable = on_status, on_refusal, on_unreachable
        self._clock = clock
        self._latest: tuple[float, NodeStatus] | None = None
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, status: NodeStatus, *, at_once: bool = False) -> None:
        """Make ``status`` the one that is sent; ``at_once`` does not wait for the next interval."""
        self._latest = (self._clock(), status)
        if at_once:
            self._wake.set()

    def hurry(self) -> None:
        """Send the latest status now: who does not answer is looked at."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread; returns when it is gone (at most one interval)."""
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self._interval + 1.0)

    def _run(self) -> None:
        channels: dict[str, grpc.Channel] = {}
        try:
            while not self._ending.is_set():
                self._wake.clear()
                self._beat(channels)
                self._wake.wait(self._interval)
        finally:
            for channel in channels.values():
                channel.close()

    def _beat(self, channels: dict[str, grpc.Channel]) -> None:
        """``channels`` by address; a node that is dialled at another address gets another one."""
        if self._latest is None or self._clock() - self._latest[0] > self._max_stale_seconds:
            return
        status = self._latest[1]
        request = cluster_pb2.HeartbeatRequest(
            cluster=self._cluster,
            version=self._version,
            node_id=status.node_id,
            status_json=status_to_text(status),
        )
        for node_id, address in self._peers.items():
            if address not in channels:
                channels[address] = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            call = channels[address].unary_unary(
                f"/{SERVICE}/Heartbeat",
                request_serializer=cluster_pb2.HeartbeatRequest.SerializeToString,
                response_deserializer=cluster_pb2.HeartbeatReply.FromString,
            )
            future = call.future(request, timeout=max(2 * self._interval, 1.0))
            future.add_done_callback(lambda done, node_id=node_id: self._answered(node_id, done))

    def _answered(self, node_id: int, done: Any) -> None:
        """Runs in a thread of gRPC: only hands over to the loop."""
        try:
            status = _status_from_text(done.result().status_json)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self._hand_over(self._on_refusal, node_id, _typed(f"node {node_id}", error.code(), error.details()))
            elif error.code() is grpc.StatusCode.UNAVAILABLE:
                self._hand_over(self._on_unreachable, node_id)
        except (ClusterError, CancelledError, grpc.FutureCancelledError):
            return
        else:
            self._hand_over(self._on_status, status)

    def _hand_over(self, callback: Callable[..., None], *arguments: Any) -> None:
        if self._ending.is_set():
            return
        with contextlib.suppress(RuntimeError):  # the loop closed in between: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *arguments)
