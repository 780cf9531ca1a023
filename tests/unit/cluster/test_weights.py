"""Model files between nodes: whole, continued where they broke off, and never more than a model's own files."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from mlx_cluster._pb import weights_pb2
from mlx_cluster.cluster import weights
from mlx_cluster.cluster.weights import CHUNK_BYTES, PARTIAL, SERVICE, ModelFiles, WeightsService, copy_model
from mlx_cluster.errors import CheckpointError, Unavailable

HASH = "0123456789abcdef"
BIG = bytes(range(256)) * (5 * CHUNK_BYTES // 512)  # two and a half chunks


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(BIG)
    (folder / "notes.md").write_text("not a part of the model")
    (folder / ".secret.json").write_text("nor this")
    return folder


@pytest.fixture
async def channel(source: Path) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    found = {"m": ModelFiles(source, HASH)}
    WeightsService("c", found.get, ("*.json", "model*.safetensors")).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


def _listing(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def copy(channel: grpc.aio.Channel, target: Path, found: str = HASH) -> list[tuple[int, int]]:
    progress: list[tuple[int, int]] = []
    await copy_model(
        channel,
        cluster="c",
        model="m",
        manifest_hash=HASH,
        target=target,
        verify=lambda _: found,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    return progress


async def test_the_files_of_a_model_arrive_whole_and_no_others(channel: grpc.aio.Channel, tmp_path: Path) -> None:
    progress = await copy(channel, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == BIG
    assert progress[-1] == (len(BIG) + 2, len(BIG) + 2)
    assert not (tmp_path / f"copy{PARTIAL}").exists()


async def test_a_copy_goes_on_where_it_broke_off(
    channel: grpc.aio.Channel, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / f"copy{PARTIAL}"
    half.mkdir()
    (half / f"model.safetensors{PARTIAL}").write_bytes(BIG[: CHUNK_BYTES + 7])
    read: list[int] = []

    def digest(data: bytes) -> bytes:
        read.append(len(data))
        return hashlib.sha256(data).digest()

    monkeypatch.setattr(weights, "_digest", digest)
    await copy(channel, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == BIG
    assert sum(read) == 2 * (len(BIG) - CHUNK_BYTES - 7 + 2), "each byte once on either side, what was there not at all"


async def test_what_is_not_whole_is_removed(channel: grpc.aio.Channel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="manifest other"):
        await copy(channel, tmp_path / "copy", found="other")
    assert {p.name for p in _listing(tmp_path)} == {"source"}


async def test_another_model_or_cluster_is_refused(channel: grpc.aio.Channel, tmp_path: Path) -> None:
    for cluster, model, words in (("d", "m", "this is cluster 'c'"), ("c", "x", "x is not here")):
        with pytest.raises(Unavailable, match=words):
            await copy_model(
                channel, cluster=cluster, model=model, manifest_hash=HASH, target=tmp_path / "t", verify=lambda _: HASH
            )
    with pytest.raises(CheckpointError, match=f"manifest {HASH}, not 77"):
        await copy_model(
            channel, cluster="c", model="m", manifest_hash="77", target=tmp_path / "t", verify=lambda _: HASH
        )


@pytest.mark.parametrize("name", ["notes.md", "../source/config.json", ".secret.json", "/etc/passwd"])
async def test_no_other_file_can_be_read(channel: grpc.aio.Channel, name: str) -> None:
    read = channel.unary_stream(
        f"/{SERVICE}/Read",
        request_serializer=weights_pb2.ReadFileRequest.SerializeToString,
        response_deserializer=weights_pb2.FileChunk.FromString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in read(weights_pb2.ReadFileRequest(cluster="c", model="m", manifest_hash=HASH, name=name)):
            pass
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_damaged_data_is_not_kept(tmp_path: Path) -> None:
    async def read(request: weights_pb2.ReadFileRequest, context: object) -> AsyncIterator[weights_pb2.FileChunk]:
        yield weights_pb2.FileChunk(offset=0, data=b"abc", sha256=hashlib.sha256(b"abc").digest())
        yield weights_pb2.FileChunk(offset=3, data=b"dXf", sha256=hashlib.sha256(b"def").digest())

    async def listing(request: weights_pb2.ListFilesRequest, context: object) -> weights_pb2.FileList:
        entry = weights_pb2.FileEntry(name="model.safetensors", num_bytes=6)
        return weights_pb2.FileList(manifest_hash=HASH, files=[entry])

    server = grpc.aio.server()
    handlers = {
        "List": grpc.unary_unary_rpc_method_handler(
            listing,
            request_deserializer=weights_pb2.ListFilesRequest.FromString,
            response_serializer=weights_pb2.FileList.SerializeToString,
        ),
        "Read": grpc.unary_stream_rpc_method_handler(
            read,
            request_deserializer=weights_pb2.ReadFileRequest.FromString,
            response_serializer=weights_pb2.FileChunk.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(Unavailable, match="damaged at byte 3"):
            await copy(channel, tmp_path / "copy")
    await server.stop(None)
    assert (tmp_path / f"copy{PARTIAL}" / f"model.safetensors{PARTIAL}").read_bytes() == b"abc"


async def test_a_disk_without_room_is_said_before_anything_is_written(
    channel: grpc.aio.Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SPARE_BYTES", 1 << 60)
    with pytest.raises(CheckpointError, match="bytes free, the model needs"):
        await copy(channel, tmp_path / "copy")
    assert list((tmp_path / f"copy{PARTIAL}").iterdir()) == []
