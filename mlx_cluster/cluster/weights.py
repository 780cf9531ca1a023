"""Model files from one node's disk to another's, over gRPC: chunked, checked, and continued where they broke off.

Owns: the ``Weights`` service, and ``copy_model``, which fetches one model from one peer.
Does not own: when a node lacks a model and whom it asks (``node.copies``), what makes a checkpoint whole
(``model.checkpoint``, as the caller's ``verify``).
Invariant: a file that has its final name is complete; a target directory that has its final name passed ``verify``;
a peer reads nothing but the files of a model's own directory.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import grpc

from mlx_cluster import log
from mlx_cluster._pb import weights_pb2
from mlx_cluster.errors import CheckpointError, Unavailable

SERVICE = "mlx_cluster.Weights"
CHUNK_BYTES = 1024 * 1024
LIST_SECONDS = 10.0
CHUNK_SECONDS = 30.0  # a peer whose disk or network gives nothing for so long has stopped
SPARE_BYTES = 512 * 1024 * 1024  # left free on the disk
PARTIAL = ".partial"

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that this node can give away: its directory and manifest."""

    directory: Path
    manifest_hash: str


class WeightsService:
    """Gives away what ``find`` knows: model id → its files, or None. ``patterns`` are the names that may be read."""

    def __init__(self, cluster: str, find: Callable[[str], ModelFiles | None], patterns: Sequence[str]) -> None:
        self._cluster, self._find, self._patterns = cluster, find, patterns

    def add_to(self, server: grpc.aio.Server) -> None:
        handlers = {
            "List": grpc.unary_unary_rpc_method_handler(
                self._list,
                request_deserializer=weights_pb2.ListFilesRequest.FromString,
                response_serializer=weights_pb2.FileList.SerializeToString,
            ),
            "Read": grpc.unary_stream_rpc_method_handler(
                self._read,
                request_deserializer=weights_pb2.ReadFileRequest.FromString,
                response_serializer=weights_pb2.FileChunk.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _list(self, request: weights_pb2.ListFilesRequest, context: Any) -> weights_pb2.FileList:
        model = await self._model(request.cluster, request.model, context)
        files = await asyncio.to_thread(_files_of, model.directory, self._patterns)
        entries = [weights_pb2.FileEntry(name=path.name, num_bytes=path.stat().st_size) for path in files]
        return weights_pb2.FileList(manifest_hash=model.manifest_hash, files=entries)

    async def _read(self, request: weights_pb2.ReadFileRequest, context: Any) -> AsyncIterator[weights_pb2.FileChunk]:
        model = await self._model(request.cluster, request.model, context)
        if model.manifest_hash != request.manifest_hash:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the model has changed meanwhile")
        allowed = {path.name: path for path in await asyncio.to_thread(_files_of, model.directory, self._patterns)}
        if request.name not in allowed:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.name!r} is no file of {request.model}")
        with allowed[request.name].open("rb") as file:
            file.seek(request.offset)
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                offset = file.tell() - len(data)
                digest = await asyncio.to_thread(_digest, data)
                yield weights_pb2.FileChunk(offset=offset, data=data, sha256=digest)

    async def _model(self, cluster: str, model: str, context: Any) -> ModelFiles:
        if cluster != self._cluster:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is cluster {self._cluster!r}")
        found = self._find(model)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{model} is not here")
        assert found is not None
        return found


async def copy_model(
    channel: grpc.aio.Channel,
    *,
    cluster: str,
    model: str,
    manifest_hash: str,
    target: Path,
    verify: Callable[[Path], str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fetch a model into the directory ``target``, continuing what an earlier attempt left beside it.

    ``verify`` gives the manifest hash of a whole checkpoint or raises ``CheckpointError``. Raises ``Unavailable`` when
    the peer cannot be reached, stops, or sends damaged data, and ``CheckpointError`` when the disk is too small, the
    peer's model is another one, or what came is not whole (it is removed then).
    """
    listing = await _list_files(channel, cluster, model)
    if listing.manifest_hash != manifest_hash:
        raise CheckpointError(f"the peer's {model} has manifest {listing.manifest_hash}, not {manifest_hash}")
    partial = target.with_name(target.name + PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    total = sum(entry.num_bytes for entry in listing.files)
    _check_space(partial, total - _held(partial.iterdir()))
    done = 0
    for entry in listing.files:
        if Path(entry.name).name != entry.name or entry.name.startswith("."):
            raise CheckpointError(f"the peer names a file {entry.name!r}: that is no file of a model")
        await _fetch(
            channel,
            weights_pb2.ReadFileRequest(cluster=cluster, model=model, manifest_hash=manifest_hash, name=entry.name),
            partial / entry.name,
            entry.num_bytes,
            lambda now, before=done: on_progress(before + now, total),  # type: ignore[misc]  # bound on purpose
        )
        done += entry.num_bytes
    try:
        found = await asyncio.to_thread(verify, partial)
    except CheckpointError:
        await asyncio.to_thread(shutil.rmtree, partial)
        raise
    if found != manifest_hash:
        await asyncio.to_thread(shutil.rmtree, partial)
        raise CheckpointError(f"the copy of {model} has manifest {found}, not {manifest_hash}: it was removed")
    partial.rename(target)
    _log.info("model copied from a peer", model=model, num_bytes=total)


async def _list_files(channel: grpc.aio.Channel, cluster: str, model: str) -> weights_pb2.FileList:
    call = channel.unary_unary(
        f"/{SERVICE}/List",
        request_serializer=weights_pb2.ListFilesRequest.SerializeToString,
        response_deserializer=weights_pb2.FileList.FromString,
    )
    try:
        reply: weights_pb2.FileList = await call(
            weights_pb2.ListFilesRequest(cluster=cluster, model=model), timeout=LIST_SECONDS
        )
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"the peer does not list {model}: {error.details()}") from error
    return reply


async def _fetch(
    channel: grpc.aio.Channel,
    request: weights_pb2.ReadFileRequest,
    path: Path,
    num_bytes: int,
    on_progress: Callable[[int], None],
) -> None:
    """One file, from where an earlier attempt stopped. A damaged chunk is not written."""
    if _size(path) == num_bytes:
        on_progress(num_bytes)
        return
    part = path.with_name(path.name + PARTIAL)
    request.offset = _size(part) or 0
    read = channel.unary_stream(
        f"/{SERVICE}/Read",
        request_serializer=weights_pb2.ReadFileRequest.SerializeToString,
        response_deserializer=weights_pb2.FileChunk.FromString,
    )
    call = read(request)
    at = request.offset
    try:
        with part.open("ab") as file:
            while at < num_bytes:
                chunk = await asyncio.wait_for(call.read(), CHUNK_SECONDS)
                if chunk is grpc.aio.EOF:
                    raise Unavailable(f"the peer's {path.name} ends after {at} of {num_bytes} bytes")
                if chunk.offset != at or await asyncio.to_thread(_digest, chunk.data) != chunk.sha256:
                    raise Unavailable(f"{path.name} came damaged at byte {at}: it will be asked for again")
                await asyncio.to_thread(file.write, chunk.data)
                at += len(chunk.data)
                on_progress(at)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
    except (grpc.aio.AioRpcError, TimeoutError) as error:
        why = error.details() if isinstance(error, grpc.aio.AioRpcError) else f"nothing for {CHUNK_SECONDS:g} s"
        raise Unavailable(f"{path.name} broke off at byte {at}: {why}") from error
    finally:
        call.cancel()
    part.rename(path)


def _files_of(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and not path.name.startswith(".") and any(fnmatch(path.name, p) for p in patterns)
    )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _held(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"{folder.parent} has {free} bytes free, the model needs {needed} more and {SPARE_BYTES} are kept free: "
            "make room, or set the node's state_dir to a larger disk"
        )
