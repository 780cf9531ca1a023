"""Bring up the two links of one stage: what a stage process does on a ``LinkCommand``.

Owns: the order of bring-up (expect the incoming hop, dial the outgoing one, then the mlx group) and its undoing.
Does not own: which kind is used (``choose``). mlx is imported only when an mlx backend is asked for.
Invariant: returns with both neighbours confirmed, or raises and leaves nothing open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_cluster.errors import LinkUnavailable
from mlx_cluster.transport.choose import MLX_KINDS
from mlx_cluster.transport.grpc_link import GrpcSendEnd, HiddenStates, connect
from mlx_cluster.transport.link import ReceiveEnd, SendEnd, StagePosition

# Frames that may wait at the receiver. The engine's credits keep the number in a pipeline low; this only bounds it.
CAPACITY = 4

# Runs a closure on the one thread that owns mlx and gives its result.
RunOnOwner = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Links:
    """Both ends a stage holds: ``receive`` is None on stage 0, ``send`` on the last stage."""

    receive: ReceiveEnd | None
    send: SendEnd | None

    async def close(self) -> None:
        """Close both ends. Idempotent."""
        for end in (self.send, self.receive):
            if end is not None:
                await end.close()

    async def cut(self) -> None:
        """Close both ends without waiting for a peer: what is on its way belongs to an epoch that is over."""
        if isinstance(self.send, GrpcSendEnd):
            self.send.cut()
        await self.close()


async def open_links(
    kind: str,
    position: StagePosition,
    *,
    hidden: HiddenStates,
    stage_addresses: Sequence[str],
    timeout_seconds: float,
    mlx_addresses: Sequence[str] = (),
    run_on_owner: RunOnOwner | None = None,
) -> Links:
    """The links of the stage at ``position``; both address lists are ordered by stage index.

    For an mlx backend ``run_on_owner`` is needed, and ``mlx_addresses`` too except for mpi. Its group can be made once
    in the life of a process, and making it may block for ever holding the GIL: see ``mlx_link.MlxGroup.open``.

    Raises ``LinkUnavailable``, ``LinkMismatch``, ``Fenced``.
    """
    if position.num_stages == 1:
        return Links(None, None)
    if kind != "grpc" and kind not in MLX_KINDS:
        raise LinkUnavailable(f"there is no link of kind {kind!r} between processes: use grpc or an mlx backend")
    if len(stage_addresses) != position.num_stages:
        raise LinkUnavailable(f"{position.num_stages} stages, but addresses for {len(stage_addresses)}")
    streams = await _open_streams(position, hidden, stage_addresses, timeout_seconds)
    if kind == "grpc":
        return streams
    try:
        return await _add_mlx(kind, position, streams, mlx_addresses, run_on_owner, timeout_seconds)
    except BaseException:
        await streams.close()
        raise


async def _open_streams(
    position: StagePosition, hidden: HiddenStates, stage_addresses: Sequence[str], timeout_seconds: float
) -> Links:
    """The gRPC streams of both hops, each confirmed by its neighbour."""
    receive = hidden.expect(position.hop_in, CAPACITY) if position.hop_in else None
    send: GrpcSendEnd | None = None

    async def dial() -> None:
        nonlocal send
        if position.hop_out is not None:
            send = await connect(stage_addresses[position.index + 1], position.hop_out, timeout_seconds)

    waits = [asyncio.create_task(dial())]
    if receive is not None:
        waits.append(asyncio.create_task(receive.connected(timeout_seconds)))
    try:
        await asyncio.gather(*waits)  # the first failure ends the bring-up
    except BaseException:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await Links(receive, send).close()
        raise
    return Links(receive, send)


async def _add_mlx(
    kind: str,
    position: StagePosition,
    notes: Links,
    mlx_addresses: Sequence[str],
    run_on_owner: RunOnOwner | None,
    timeout_seconds: float,
) -> Links:
    from mlx_cluster.transport.mlx_link import MlxGroup  # only here: a gRPC stage must not pay for, or need, mlx

    if run_on_owner is None:
        raise LinkUnavailable(f"a {kind} link needs the thread that owns mlx, and this stage has none")
    group = await MlxGroup.open(kind, position, mlx_addresses, run_on_owner, timeout_seconds)
    return Links(
        receive=group.receiver(notes.receive) if notes.receive is not None else None,
        send=group.sender(notes.send) if notes.send is not None else None,
    )
