"""The gRPC link: hidden states as raw bytes on one client stream per hop.

Owns: the stream's service (``HiddenStates``, at the receiver), ``connect`` (at the sender), and how gRPC's ways of
failing become ``LinkError``.
Does not own: the layout of a message (``framing``), the server it is added to, or which hops exist.
Invariant: one stream per hop and epoch; a stream of a lower epoch than the expected one is refused; what the receiver
has not taken is bounded by its mailbox and HTTP/2's window, so a slow stage holds its neighbour back.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from mlx_cluster import log, wire
from mlx_cluster.errors import (
    ClusterError,
    Fenced,
    LinkClosed,
    LinkError,
    LinkMismatch,
    LinkTimeout,
    LinkUnavailable,
)
from mlx_cluster.microbatch import Frame
from mlx_cluster.plan import Epoch
from mlx_cluster.transport import framing
from mlx_cluster.transport.link import HopId, ReceiveEnd, SendEnd
from mlx_cluster.transport.mailbox import Mailbox

SERVICE = "mlx_cluster.Hidden"
METHOD = "Send"
HOP_KEY = "hop-bin"  # metadata of the call: which hop this stream is, as JSON
CODE_KEY = "mlx-cluster-code"  # trailing metadata of a refusal: the typed error's code
CLOSE_SECONDS = 1.0  # how long a closing end waits for the peer before it cuts the stream

# A neighbour may start later: dial again soon instead of after gRPC's growing pause (up to two minutes). Stages dial
# addresses of the plan, so a proxy from the environment would be wrong.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *wire.GRPC_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]

_log = log.get("transport.grpc")


def encode_hop(hop: HopId) -> bytes:
    return json.dumps(
        {"pipeline": hop.pipeline, "epoch": str(hop.epoch), "plan_hash": hop.plan_hash, "sender": hop.sender},
        sort_keys=True,
    ).encode()


def decode_hop(data: bytes) -> HopId:
    """Inverse of ``encode_hop``. Raises ``LinkMismatch`` on anything else."""
    try:
        fields = json.loads(data)
        return HopId(
            str(fields["pipeline"]), Epoch.parse(fields["epoch"]), str(fields["plan_hash"]), int(fields["sender"])
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LinkMismatch(f"the call does not say which hop it is ({error!r})") from error


# -- the receiver -------------------------------------------------------------------------------------


class GrpcReceiveEnd:
    """See ``link.ReceiveEnd``. Exists before its stream does; a receive that timed out may be repeated."""

    def __init__(self, hop: HopId, capacity: int) -> None:
        self.hop = hop
        self.mailbox = Mailbox(capacity)
        self._attached = asyncio.Event()
        self._pump: asyncio.Task[Any] | None = None

    async def connected(self, timeout_seconds: float) -> None:
        """Wait until the sender's stream is here. Raises ``LinkUnavailable`` when it does not come."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._attached.wait()
        except TimeoutError:
            raise LinkUnavailable(
                f"{self.hop}: stage {self.hop.sender} did not connect within {timeout_seconds:g} s"
            ) from None

    async def receive(self, timeout_seconds: float) -> Frame:
        try:
            return await self.mailbox.get(timeout_seconds)
        except TimeoutError:
            raise LinkTimeout(f"{self.hop}: nothing came within {timeout_seconds:g} s") from None

    async def close(self) -> None:
        self.end(LinkClosed(f"{self.hop}: stage {self.hop.sender + 1} closed it"))

    def end(self, error: LinkError) -> None:
        """Close with this error and drop what nobody took; the stream ends soon after."""
        self.mailbox.close(error, discard=True)
        if self._pump is not None:
            self._pump.cancel()

    def attach(self, pump: asyncio.Task[Any]) -> None:
        """``pump`` now feeds the mailbox. Raises ``LinkMismatch`` when another stream does already."""
        if self.mailbox.closed:
            raise LinkClosed(f"{self.hop}: stage {self.hop.sender + 1} closed it")
        if self._pump is not None:
            raise LinkMismatch(f"{self.hop} has a stream already: two processes act as stage {self.hop.sender}")
        self._pump = pump
        self._attached.set()


class HiddenStates:
    """Receives the hidden-state streams of one stage process and gives each to the end that expects it.

    A stream whose hop is not expected yet is held for ``hold_seconds``, and at most ``max_held`` of them at once; a
    stage may be told of its links later than its neighbour.
    """

    def __init__(self, *, hold_seconds: float = 30.0, max_held: int = 8) -> None:
        self._hold_seconds, self._max_held = hold_seconds, max_held
        self._ends: dict[tuple[str, int], GrpcReceiveEnd] = {}
        self._floors: dict[str, Epoch] = {}
        self.num_held = 0
        self._expectations_changed = asyncio.Event()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the stream's handler; call before ``server.start()``."""
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # no serializers: messages are bytes as they are
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    def fence(self, pipeline: str, epoch: Epoch) -> None:
        """From now on nothing of a lower epoch of this pipeline is taken: its ends are closed, its streams refused."""
        self._floors[pipeline] = epoch
        for key, end in list(self._ends.items()):
            if key[0] == pipeline and end.hop.epoch < epoch:
                end.end(LinkClosed(f"{end.hop}: epoch {epoch} took over"))
                del self._ends[key]
        self._look_again()

    def expect(self, hop: HopId, capacity: int) -> GrpcReceiveEnd:
        """The receiving end of this hop; ends of lower epochs of the same hop are closed.

        ``capacity`` bounds the frames that are here and not yet taken. Raises ``Fenced`` for a lower epoch than one
        already expected.
        """
        key = (hop.pipeline, hop.sender)
        self._check(hop)
        before = self._ends.get(key)
        if before is not None:
            if hop.epoch < before.hop.epoch:
                raise Fenced(f"{hop}: epoch {before.hop.epoch} is in force already")
            before.end(LinkClosed(f"{before.hop}: epoch {hop.epoch} took over"))
        end = GrpcReceiveEnd(hop, capacity)
        self._ends[key] = end
        self._look_again()
        return end

    def _look_again(self) -> None:
        """Streams that are held may be expected, or out of date, by now."""
        self._expectations_changed.set()
        self._expectations_changed = asyncio.Event()

    def _check(self, hop: HopId) -> None:
        floor = self._floors.get(hop.pipeline)
        if floor is not None and hop.epoch < floor:
            raise Fenced(f"{hop}: epoch {floor} is in force")

    async def close(self) -> None:
        """Close every end."""
        for end in self._ends.values():
            await end.close()

    async def _serve(self, _requests: Any, context: Any) -> None:
        """One stream: claim its hop, answer, then move frames until somebody ends it."""
        try:
            end = await self._claim(_hop_of(context))
        except ClusterError as error:
            await _refuse(context, error)
            return
        try:
            await context.write(encode_hop(end.hop))
            while (message := await context.read()) is not grpc.aio.EOF:
                await end.mailbox.put(framing.decode(message))
            end.mailbox.close(LinkClosed(f"{end.hop}: stage {end.hop.sender} closed it"))
        except LinkError as error:
            end.mailbox.close(error)
            await _refuse(context, error)
        except asyncio.CancelledError:
            # Cancelled by ``GrpcReceiveEnd.end``, or by gRPC: the sender's process died or its connection broke.
            if not end.mailbox.closed:
                end.mailbox.close(LinkClosed(f"{end.hop}: stage {end.hop.sender} is gone"))
                raise
            await _refuse(context, LinkClosed(f"{end.hop}: stage {end.hop.sender + 1} closed it"))

    async def _claim(self, hop: HopId) -> GrpcReceiveEnd:
        """The end that expects this hop, attached; waits for it a bounded time when nobody expects it yet."""
        end = self._match(hop)
        if end is None:
            if self.num_held >= self._max_held:
                raise LinkUnavailable(f"{hop} is not expected, and {self._max_held} other streams wait already")
            self.num_held += 1
            try:
                async with asyncio.timeout(self._hold_seconds):
                    while (end := self._match(hop)) is None:
                        await self._expectations_changed.wait()
            except TimeoutError:
                raise LinkUnavailable(
                    f"{hop} was not expected within {self._hold_seconds:g} s: the next stage was not told to link"
                ) from None
            finally:
                self.num_held -= 1
        task = asyncio.current_task()
        assert task is not None
        end.attach(task)
        return end

    def _match(self, hop: HopId) -> GrpcReceiveEnd | None:
        """The end for this hop, or None when it is not expected yet. Raises ``Fenced`` and ``LinkMismatch``."""
        self._check(hop)
        newest = max((e.hop.epoch for e in self._ends.values() if e.hop.pipeline == hop.pipeline), default=None)
        if newest is not None and hop.epoch < newest:
            raise Fenced(f"{hop}: epoch {newest} is in force")
        end = self._ends.get((hop.pipeline, hop.sender))
        if end is None or end.hop.epoch != hop.epoch:
            return None
        if end.hop.plan_hash != hop.plan_hash:
            raise LinkMismatch(
                f"{hop}: stage {hop.sender} follows plan {hop.plan_hash}, "
                f"stage {hop.sender + 1} plan {end.hop.plan_hash}"
            )
        return end


def _hop_of(context: Any) -> HopId:
    for key, value in context.invocation_metadata() or ():
        if key == HOP_KEY:
            return decode_hop(value)
    raise LinkMismatch(f"the call has no {HOP_KEY} metadata: something else than a stage calls this port")


async def _refuse(context: Any, error: ClusterError) -> None:
    if not isinstance(error, LinkClosed):
        _log.warning("hidden-state stream refused", code=error.code, error=str(error))
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error), ((CODE_KEY, error.code),))


# -- the sender ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stream:
    """A client stream and the channel that only it uses."""

    channel: Any
    call: Any


class GrpcSendEnd:
    """See ``link.SendEnd``. A send that timed out is cut in the middle: the end is closed by it."""

    def __init__(self, hop: HopId, address: str, stream: _Stream) -> None:
        self.hop, self._address, self._stream = hop, address, stream
        self._order = asyncio.Lock()
        self._over: ClusterError | None = None  # why later sends fail, once we know

    async def send(self, frame: Frame, timeout_seconds: float) -> None:
        message = framing.encode(frame)
        expired = False

        def cut() -> None:
            nonlocal expired
            expired = True
            self._over = self._over or LinkClosed(f"{self._name}: an earlier frame did not get through")
            self._stream.call.cancel()

        # The deadline cuts the call, which ends the write: cheaper than a timeout around it, on every hop of a token.
        timer = asyncio.get_running_loop().call_later(timeout_seconds, cut)
        try:
            async with self._order:
                if self._over is None:
                    await self._stream.call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            self._over = self._over or await _why_over(self._stream.call, self._name)
        except asyncio.CancelledError:
            # gRPC says so too when the call was cut under a waiting write: only a cancelled task may pass it on.
            if _this_task_is_cancelled() or not self._stream.call.done():
                self._over = self._over or LinkClosed(f"{self._name}: a send was cancelled in the middle of a frame")
                raise
            self._over = self._over or LinkClosed(f"{self._name}: the stream was cut")
        finally:
            timer.cancel()
        if expired:
            raise LinkTimeout(
                f"{self._name}: microbatch {frame.microbatch_id} ({len(message)} bytes) was not taken "
                f"within {timeout_seconds:g} s"
            )
        if self._over is not None:
            raise type(self._over)(str(self._over))

    def cut(self) -> None:
        """Let go at once, whatever is on its way; the next stage hears that the stream is gone."""
        self._over = self._over or LinkClosed(f"{self._name}: stage {self.hop.sender} cut it")
        self._stream.call.cancel()

    async def close(self) -> None:
        """Let what was sent arrive (within ``CLOSE_SECONDS``), then let go."""
        if self._over is None:
            self._over = LinkClosed(f"{self._name}: stage {self.hop.sender} closed it")
            try:
                async with asyncio.timeout(CLOSE_SECONDS), self._order:
                    await self._stream.call.done_writing()
                    await self._stream.call.code()
            except TimeoutError:
                pass  # the peer does not read: cut the stream
            except asyncio.CancelledError:
                if _this_task_is_cancelled():
                    raise
        self._stream.call.cancel()
        await self._stream.channel.close()

    @property
    def _name(self) -> str:
        return f"{self.hop} at {self._address}"


async def connect(address: str, hop: HopId, timeout_seconds: float) -> GrpcSendEnd:
    """The sending end of this hop, once the receiver at ``address`` ("host:port") has confirmed it.

    Raises ``LinkUnavailable`` when it does not answer in time, ``LinkMismatch`` when it follows another plan,
    ``Fenced`` when a higher epoch is in force there.
    """
    channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    method = channel.stream_stream(f"/{SERVICE}/{METHOD}")  # no serializers: messages are bytes as they are
    call: Any = method(metadata=((HOP_KEY, encode_hop(hop)),), wait_for_ready=True)
    end = GrpcSendEnd(hop, address, _Stream(channel, call))
    try:
        async with asyncio.timeout(timeout_seconds):
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise await _why_over(call, f"{hop} at {address}")
            confirmed = decode_hop(answer)
            if confirmed != hop:
                raise LinkMismatch(f"{hop}: {address} answers for {confirmed}")
    except TimeoutError:
        await _abandon(end)
        raise LinkUnavailable(
            f"{hop}: stage {hop.sender + 1} at {address} did not answer within {timeout_seconds:g} s; "
            "look whether it is running and that its port can be reached"
        ) from None
    except grpc.aio.AioRpcError:
        error = await _why_over(call, f"{hop} at {address}")
        await _abandon(end)
        raise error from None
    except BaseException:
        await _abandon(end)
        raise
    return end


async def _abandon(end: GrpcSendEnd) -> None:
    end._stream.call.cancel()
    await end._stream.channel.close()


async def _why_over(call: Any, name: str) -> ClusterError:
    """The typed error of a call that ended: the receiver's own when it sent one, else ``LinkClosed``."""
    if not call.done():
        return LinkClosed(f"{name}: the stream broke")
    trailing = dict(await call.trailing_metadata() or ())
    details = await call.details()
    if CODE_KEY in trailing:
        return wire.error_from_code(str(trailing[CODE_KEY]), str(details))
    status = await call.code()
    # A write that finds the stream reset overwrites its status with INTERNAL: that word would say nothing.
    known = "" if status in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL) else f" ({status.name}: {details})"
    return LinkClosed(f"{name}: the next stage is gone or closed it{known}")


def _this_task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_: tuple[type[SendEnd], type[ReceiveEnd]] = (GrpcSendEnd, GrpcReceiveEnd)  # mypy checks the protocols here
