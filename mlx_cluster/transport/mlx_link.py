"""The mlx link: hidden states over mx.distributed (ring, mpi, jaccl, nccl), announced by notes on a gRPC stream.

Owns: the group of this process, the posting of its sends and receives, and the thread that waits for each.
Does not own: the thread that owns mlx (``run_on_owner`` lends it), the notes' stream, or the ports.
Invariant: a receive is posted only after the sender's note said how many bytes come, and both ends post in the order
of the notes, so that messages without tags or sizes can neither mix nor hang a healthy pair.

What the platform imposes, all measured on mlx 0.32:

* A group is a static of the process and outlives every error: one group per process, a new epoch is a new process.
* A peer that is stopped, or whose size does not match, leaves an operation that never ends and spins. Nothing inside
  the process can cancel it, so after ``LinkTimeout`` on data the process is of no use: the agent's kill ends it.
* A waiting ring or mpi receive keeps a core busy, hence the notes.
* An operation blocks the stream it runs on: each direction has its own, and the default stream computes on.
"""

from __future__ import annotations

import asyncio
import json
import queue
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from typing_extensions import Buffer

from mlx_cluster.errors import LinkClosed, LinkError, LinkMismatch, LinkTimeout, LinkUnavailable
from mlx_cluster.microbatch import Frame
from mlx_cluster.transport import framing
from mlx_cluster.transport.handshake import HANDSHAKE_BYTES, check_handshake, encode_handshake
from mlx_cluster.transport.link import HopId, ReceiveEnd, SendEnd, StagePosition
from mlx_cluster.transport.mlx_environment import (
    backend_environment,
    check_port_is_free,
    ipv4_literal,
    set_environment,
)

_async_eval: Any = mx.async_eval  # mlx's stubs leave it untyped
RunOnOwner = Callable[[Callable[[], Any]], Awaitable[Any]]


class MlxGroup:
    """The mx.distributed group of this process, of which stage *i* is rank *i*."""

    def __init__(self, group: Any, streams: tuple[Any, Any], position: StagePosition, run_on_owner: RunOnOwner) -> None:
        self._group, self._position, self._run_on_owner = group, position, run_on_owner
        self._send_stream, self._receive_stream = streams

    @classmethod
    async def open(
        cls,
        backend: str,
        position: StagePosition,
        addresses: Sequence[str],
        run_on_owner: RunOnOwner,
        timeout_seconds: float,
    ) -> MlxGroup:
        """Form the group and exchange a handshake with both neighbours. Once in the life of a process.

        ``addresses`` ("host:port", by stage) are needed for ring, jaccl and nccl. mpi needs a process that mpirun, or
        a child of it, started. All ranks must call this at about the same time.

        Forming the group blocks **holding the GIL** until every rank came (the ring's accept has no time-out), so
        ``timeout_seconds`` cannot end it and bounds only the handshake: the caller arms a kernel timer before.

        Raises ``LinkUnavailable``, ``LinkMismatch``, ``LinkTimeout``.
        """
        literals = [await ipv4_literal(address) for address in addresses]
        if backend != "mpi" and len(literals) != position.num_stages:
            raise LinkUnavailable(f"a {backend} group of {position.num_stages} needs as many addresses, not {literals}")
        if backend == "ring":
            check_port_is_free(literals[position.index])
        with tempfile.TemporaryDirectory(prefix="mlx-cluster-") as directory:
            hostfile = Path(directory) / "ring.json"
            hostfile.write_text(json.dumps([[address] for address in literals]))
            environment = backend_environment(backend, position.index, position.num_stages, literals, hostfile)
            group, streams = await run_on_owner(lambda: _init(backend, position, environment))
        opened = cls(group, streams, position, run_on_owner)
        await opened._exchange_handshakes(timeout_seconds)
        return opened

    def sender(self, notes: SendEnd) -> MlxSendEnd:
        """The end towards the next rank; ``notes`` is the sending end of the same hop's note stream, now owned."""
        hop = self._position.hop_out
        if hop is None:
            raise LinkMismatch(f"stage {self._position.index} is the last: it has nobody to send to")
        return MlxSendEnd(hop, notes, lambda payload: self.post_send(payload, hop.sender + 1))

    def receiver(self, notes: ReceiveEnd) -> MlxReceiveEnd:
        """The end from the previous rank; ``notes`` is the receiving end of the same hop's note stream, now owned."""
        hop = self._position.hop_in
        if hop is None:
            raise LinkMismatch("stage 0 has nobody to receive from")
        return MlxReceiveEnd(hop, notes, lambda num_bytes: self.post_receive(num_bytes, hop.sender))

    async def post_send(self, payload: Buffer, rank: int) -> Any:
        """Dispatch a send to a direct neighbour; the array that comes back is evaluated when it is gone."""

        def post() -> Any:
            data: Any = payload if isinstance(payload, mx.array) else mx.array(cast(Any, framing.flat(payload)))
            sent = mx.distributed.send(
                data.reshape(-1).view(mx.uint8), rank, group=self._group, stream=self._send_stream
            )
            _async_eval(sent)
            return sent

        return await self._run_on_owner(post)

    async def post_receive(self, num_bytes: int, rank: int) -> Any:
        """Dispatch a receive from a direct neighbour; the array that comes back holds the bytes once evaluated."""

        def post() -> Any:
            data = mx.distributed.recv((num_bytes,), mx.uint8, rank, group=self._group, stream=self._receive_stream)
            _async_eval(data)
            return data

        return await self._run_on_owner(post)

    async def _exchange_handshakes(self, timeout_seconds: float) -> None:
        """Tell both neighbours epoch, plan and rank, and compare theirs: an mlx message carries no such words."""
        index = self._position.index
        neighbours = [rank for rank in (index - 1, index + 1) if 0 <= rank < self._position.num_stages]
        mine = encode_handshake(self._position)
        waiter = ArrayWaiter("mlx-handshake")
        try:
            async with asyncio.timeout(timeout_seconds):
                sent = [await self.post_send(mine, rank) for rank in neighbours]
                received = [await self.post_receive(HANDSHAKE_BYTES, rank) for rank in neighbours]
                for array in (*sent, *received):
                    await waiter.wait(array)
        except TimeoutError:
            raise LinkTimeout(
                f"stage {index}: ranks {neighbours} sent no handshake within {timeout_seconds:g} s"
            ) from None
        except RuntimeError as error:
            raise LinkClosed(f"stage {index}: a neighbour left during the handshake: {error}") from error
        finally:
            waiter.stop()
        for rank, array in zip(neighbours, received, strict=True):
            check_handshake(self._position, rank, bytes(memoryview(array)))


class MlxSendEnd:
    """See ``link.SendEnd``. A note and its data belong together: a send that fails ends the link."""

    def __init__(self, hop: HopId, notes: SendEnd, post: Callable[[Buffer], Awaitable[Any]]) -> None:
        self._hop, self._notes, self._post = hop, notes, post
        self._order = asyncio.Lock()
        self._waiter = ArrayWaiter(f"mlx-send-{hop.sender}")
        self._over: LinkError | None = None

    async def send(self, frame: Frame, timeout_seconds: float) -> None:
        num_bytes = _checked_size(frame)
        try:
            async with asyncio.timeout(timeout_seconds), self._order:
                _raise(self._over)
                await self._send_both(frame, num_bytes, timeout_seconds)
        except TimeoutError:
            raise LinkTimeout(
                f"{self._hop}: microbatch {frame.microbatch_id} ({num_bytes} bytes) was not taken "
                f"within {timeout_seconds:g} s"
            ) from None

    async def _send_both(self, frame: Frame, num_bytes: int, timeout_seconds: float) -> None:
        """The note, and beside it the data: a large send ends only when the peer, told by the note, takes it."""
        posting = asyncio.ensure_future(self._post(frame.payload)) if num_bytes else None
        try:
            await self._notes.send(Frame(frame.microbatch_id, frame.tensors, b""), timeout_seconds)
            if posting is not None:
                await self._waiter.wait(await posting)
        except RuntimeError as error:
            self._over = LinkClosed(f"{self._hop}: stage {self._hop.sender + 1} is gone: {error}")
            raise type(self._over)(str(self._over)) from error
        except LinkClosed as error:
            self._over = error
            raise
        except (LinkError, asyncio.CancelledError):
            self._over = LinkClosed(f"{self._hop}: an earlier send was given up; restart this process")
            raise
        finally:
            if posting is not None:
                posting.add_done_callback(_drop)
                posting.cancel()

    async def close(self) -> None:
        self._over = self._over or LinkClosed(f"{self._hop}: stage {self._hop.sender} closed it")
        self._waiter.stop()
        await self._notes.close()


class MlxReceiveEnd:
    """See ``link.ReceiveEnd``. The payload is the received mx.array (flat uint8) itself.

    No note within the deadline raises ``LinkTimeout`` and the receive may be repeated. Data that stay out after their
    note raise it too, and then the posted receive spins for good: only the end of the process frees its core.
    """

    def __init__(self, hop: HopId, notes: ReceiveEnd, post: Callable[[int], Awaitable[Any]]) -> None:
        self._hop, self._notes, self._post = hop, notes, post
        self._waiter = ArrayWaiter(f"mlx-receive-{hop.sender + 1}")
        self._over: LinkError | None = None

    async def receive(self, timeout_seconds: float) -> Frame:
        _raise(self._over)
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        note = await self._notes.receive(timeout_seconds)
        try:
            num_bytes = framing.num_bytes(note.tensors)
            if framing.flat(note.payload).nbytes:
                raise LinkMismatch(f"{self._hop}: the peer sends data on the note stream: it uses a gRPC link")
            if not num_bytes:
                return note
            async with asyncio.timeout_at(deadline):
                data = await self._post(num_bytes)
                await self._waiter.wait(data)
        except TimeoutError:
            self._over = LinkClosed(f"{self._hop}: the data of a note did not come; restart this process")
            raise LinkTimeout(
                f"{self._hop}: microbatch {note.microbatch_id} was announced, but its {num_bytes} bytes "
                f"did not come within {timeout_seconds:g} s"
            ) from None
        except RuntimeError as error:
            self._over = LinkClosed(f"{self._hop}: stage {self._hop.sender} is gone: {error}")
            raise type(self._over)(str(self._over)) from error
        except (LinkError, asyncio.CancelledError):
            self._over = LinkClosed(f"{self._hop}: an announced frame was given up; restart this process")
            raise
        return Frame(note.microbatch_id, note.tensors, data)

    async def close(self) -> None:
        self._over = self._over or LinkClosed(f"{self._hop}: stage {self._hop.sender + 1} closed it")
        self._waiter.stop()
        await self._notes.close()


class ArrayWaiter:
    """One thread that waits for arrays which the owner thread gave to ``async_eval``.

    ``memoryview`` waits without the GIL, and reading an evaluated array is allowed in any thread. A daemon, because an
    operation whose peer is stopped never ends.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Any, asyncio.Future[None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def wait(self, array: Any) -> None:
        """Until the array is evaluated. Raises the ``RuntimeError`` of the operation that made it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs.put((array, done))  # bounded by its callers: each end waits for one array at a time
        await done

    def stop(self) -> None:
        """Let the thread end after what it waits for now."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            array, done = job
            try:
                memoryview(array)
                error = None
            except RuntimeError as raised:
                error = raised
            try:
                done.get_loop().call_soon_threadsafe(_settle, done, error)
            except RuntimeError:
                return  # the event loop is closed: nobody waits any more


def _drop(posting: asyncio.Future[Any]) -> None:
    """The note already told what went wrong: asyncio must not complain that nobody asked the data's side."""
    if not posting.cancelled():
        posting.exception()


def _settle(done: asyncio.Future[None], error: RuntimeError | None) -> None:
    if done.done():
        return  # given up
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


# -- bring-up -----------------------------------------------------------------------------------------


def _init(backend: str, position: StagePosition, environment: Mapping[str, str]) -> tuple[Any, tuple[Any, Any]]:
    """On the owner thread: the group and its two streams."""
    try:
        with set_environment(environment):
            group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise LinkUnavailable(f"the {backend} group could not be formed: {error}") from error
    if (group.rank(), group.size()) != (position.index, position.num_stages):
        raise LinkUnavailable(
            f"this process is rank {group.rank()} of {group.size()} of {backend}, but stage {position.index} of "
            f"{position.num_stages}: start one rank for each stage, in the order of the stages"
        )
    device = mx.gpu if backend == "nccl" else mx.cpu
    return group, (mx.new_stream(device), mx.new_stream(device))


def _checked_size(frame: Frame) -> int:
    """Bytes of the frame's data; the payload must have as many, or the peer would wait for ever."""
    expected = framing.num_bytes(frame.tensors)
    payload: Any = frame.payload
    actual = payload.nbytes if isinstance(payload, mx.array) else framing.flat(payload).nbytes
    if actual != expected:
        raise LinkMismatch(
            f"microbatch {frame.microbatch_id}: its tensors take {expected} bytes, the payload has {actual}"
        )
    return expected


def _raise(error: LinkError | None) -> None:
    if error is not None:
        raise type(error)(str(error))


_: tuple[type[SendEnd], type[ReceiveEnd]] = (MlxSendEnd, MlxReceiveEnd)  # mypy checks the protocols here
