"""The gRPC server of a stage process: the engine's Run stream, and the receiver of the previous stage's hidden states.

Owns: ``Stage.Run`` (who may open it, headers in, reports and ticks out) and the port, over all epochs of the process.
Does not own: the work (``worker``), or the hidden-state streams (``transport.grpc_link``).
Invariant: one Run stream in each epoch, for exactly that epoch, plan and pipeline; when it ends the epoch is over. What
belongs to an epoch lies in an ``EpochStream`` of its own, so that nothing of an older one can be heard or said in a
newer one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from mlx_cluster import log
from mlx_cluster._pb import stage_pb2
from mlx_cluster.errors import ClusterError, Fenced, PortInUse, StageLost, Unavailable
from mlx_cluster.microbatch import Held, Report, Saved
from mlx_cluster.plan import Epoch
from mlx_cluster.stage.spec import StageSpec
from mlx_cluster.stage.worker import Worker
from mlx_cluster.transport.grpc_link import CODE_KEY, HiddenStates
from mlx_cluster.wire import GRPC_OPTIONS, decode_microbatch, encode_report, encode_saved_entries

SERVICE = "mlx_cluster.Stage"
# Reports that the engine has not read yet; its credits keep the number far lower.
MAX_UNREAD = 4096
_CLOSE_SECONDS = 1.0

logger = log.get("stage.service")


class StageService:
    """The server of one stage process. ``enter`` begins an epoch."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.hidden = HiddenStates()
        self._server: Any = grpc.aio.server(options=GRPC_OPTIONS)
        self._current: EpochStream | None = None

    async def start(self) -> str:
        """Listen; gives host:port. Raises ``PortInUse``."""
        handler = grpc.stream_stream_rpc_method_handler(
            self._run,
            request_deserializer=stage_pb2.EngineMessage.FromString,
            response_serializer=stage_pb2.StageMessage.SerializeToString,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Run": handler}),))
        self.hidden.add_to(self._server)
        try:
            port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise PortInUse(
                f"the stage cannot listen on {self._host}:{self._port}: "
                "another program holds the port, or the address is not this machine's"
            ) from error
        await self._server.start()
        return f"{self._host}:{port}"

    def enter(self, spec: StageSpec) -> EpochStream:
        """From now on this epoch alone is heard and served. Raises ``Fenced`` for one that is not newer."""
        before = self._current
        if before is not None:
            if spec.epoch <= before.epoch:
                raise Fenced(f"stage {spec.index} is in epoch {before.epoch} already, {spec.epoch} is over")
            before.cut(Fenced(f"epoch {before.epoch} is over: {spec.epoch} took over"))
        self.hidden.fence(spec.plan.pipeline, spec.epoch)
        self._current = EpochStream(spec)
        return self._current

    async def close(self) -> None:
        """Close all streams and the port."""
        await self.hidden.close()
        await self._server.stop(grace=0)

    async def _run(self, _requests: Any, context: Any) -> None:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        try:
            if self._current is None:
                raise Unavailable("the stage is in no epoch yet: open the stream after LinkStage")
            epoch, worker = self._current, self._current.admit(metadata)
        except ClusterError as error:
            logger.warning("engine stream refused", code=error.code, error=str(error))
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}: {error}", ((CODE_KEY, error.code),)
            )
            return
        await epoch.serve(context, worker)


class EpochStream:
    """The one Run stream of one epoch: made when the epoch begins, opened by its engine once the stage is linked."""

    def __init__(self, spec: StageSpec) -> None:
        self._spec = spec
        self._plan_hash = spec.plan.hash()
        self._worker: Worker | None = None
        self._saved: Sequence[Saved] = ()
        self._held: Callable[[], Held] | None = None
        self._opened = False
        self._handler: asyncio.Task[Any] | None = None
        self._outbox: asyncio.Queue[stage_pb2.StageMessage | None] = asyncio.Queue(MAX_UNREAD)
        self._ended: asyncio.Future[ClusterError] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()

    @property
    def epoch(self) -> Epoch:
        return self._spec.epoch

    def begin(self, worker: Worker, saved: Sequence[Saved] = (), held: Callable[[], Held] | None = None) -> None:
        """From now on the engine may open its stream, where it hears first which entries lie ``saved`` here.

        ``held`` counts what the runner holds; it is asked in the event loop, beside the thread that changes it.
        """
        self._worker, self._saved, self._held = worker, saved, held

    def report(self, report: Report) -> None:
        """Hand a report to the engine, without waiting."""
        self._say(stage_pb2.StageMessage(report=encode_report(report)))

    async def ended(self) -> ClusterError:
        """Wait until the engine's stream is over; gives the reason."""
        return await asyncio.shield(self._ended)

    async def fail(self, error: ClusterError) -> None:
        """Tell the engine that the epoch is over, when it still listens, and end its stream; nobody else is let in."""
        self._end(error)
        opened, self._opened = self._opened, True
        if not opened:
            return
        self._say(stage_pb2.StageMessage(failure=stage_pb2.StageFailure(code=error.code, message=str(error))))
        self._say(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._closed.wait()

    def cut(self, error: ClusterError) -> None:
        """Nobody is let in any more, and whoever still reads is cut off."""
        self._worker, self._opened = None, True
        self._end(error)
        if self._handler is not None and not self._closed.is_set():
            self._handler.cancel()

    # -- the stream -----------------------------------------------------------------------------------

    def admit(self, metadata: dict[str, str]) -> Worker:
        """The worker, for a caller that speaks of this pipeline, plan and epoch, for the first time.

        Raises ``Fenced`` for any other, ``Unavailable`` before the links are there.
        """
        spec = self._spec
        ours = {"pipeline": spec.plan.pipeline, "plan-hash": self._plan_hash, "epoch": str(spec.epoch)}
        for key, value in ours.items():
            if metadata.get(key) != value:
                raise Fenced(
                    f"stage {spec.index} is in {key} {value}, the engine in {metadata.get(key)}{_older(metadata, spec)}"
                )
        if self._opened:
            raise Fenced(f"stage {spec.index} has had its one stream for epoch {spec.epoch}: start a new epoch")
        if self._worker is None:
            raise Unavailable(f"stage {spec.index} is not linked yet: open the stream after LinkStage")
        self._opened = True
        return self._worker

    async def serve(self, context: Any, worker: Worker) -> None:
        """Until the engine, or this side, has had enough."""
        self._handler = asyncio.current_task()
        self._say(stage_pb2.StageMessage(saved=encode_saved_entries(self._told())))
        reader = asyncio.create_task(self._read(context, worker), name="headers of the engine")
        try:
            while (message := await self._outbox.get()) is not None:
                await context.write(message)
        finally:
            # Reached by cancellation too: the engine cancelled the call, its process is gone, or the epoch was cut.
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._end(StageLost("the engine's stream is gone: the epoch is over"))
            self._closed.set()

    async def _read(self, context: Any, worker: Worker) -> None:
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                match message.WhichOneof("kind"):
                    case "microbatch":
                        await worker.put(decode_microbatch(message.microbatch))
                    case "tick":
                        self._say(self._tick())
                    case kind:
                        raise StageLost(f"the engine sent a message of kind {kind}: it runs another version")
            self._end(StageLost("the engine closed its stream: the epoch is over"))
        except ClusterError as error:
            self._end(error)
        except Exception as error:
            # The root of the stream: whatever cannot be read ends the epoch.
            logger.exception("the engine's stream cannot be read")
            self._end(StageLost(f"the engine's stream cannot be read: {error}"))
        self._say(None)

    def _tick(self) -> stage_pb2.StageMessage:
        if self._held is None:
            return stage_pb2.StageMessage(tick=stage_pb2.Tick())
        held = self._held()
        return stage_pb2.StageMessage(tick=stage_pb2.Tick(held=stage_pb2.Held(rows=held.rows, entries=held.entries)))

    def _told(self) -> list[Saved]:
        """The tokens of saved entries are the same on every stage: the first one's word is enough."""
        return [entry if self._spec.index == 0 else Saved(entry.digest) for entry in self._saved]

    def _say(self, message: stage_pb2.StageMessage | None) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self._end(StageLost(f"the engine has left {MAX_UNREAD} reports unread"))

    def _end(self, reason: ClusterError) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)


def _older(metadata: dict[str, str], spec: StageSpec) -> str:
    try:
        theirs = Epoch.parse(metadata.get("epoch", ""))
    except ValueError:
        return ""
    return ", which is over" if theirs < spec.epoch else ""
