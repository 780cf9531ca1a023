"""The voter's file: whole or lost, never anything between."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.cluster import stable
from mlx_cluster.cluster.election.values import Document, Durable, Era, Version
from mlx_cluster.errors import ConfigError

FULL = Durable(
    cluster="home",
    voter="mini1:7f",
    era=Era(1, "mini1:7f"),
    term=4,
    voted_for="mini2:a0",
    document=Document(Version(3, 9), '{"plans": []}', ("mini1:7f", "mini2:a0"), witnesses=("mini2:a0",)),
    sequence=12,
    seen=(("mini2:a0", 5),),
)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state" / "voter"
    for durable in (stable.blank("home", "mini1", "7f"), FULL):
        stable.save(path, durable)
        assert stable.load(path) == durable
    assert [p.name for p in path.parent.iterdir()] == ["voter"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_missing_file_is_a_lost_disk(tmp_path: Path) -> None:
    lost = stable.load(tmp_path / "voter")
    assert isinstance(lost, stable.LostDisk)
    assert "missing" in lost.reason


def test_a_file_torn_anywhere_is_a_lost_disk(tmp_path: Path) -> None:
    path = tmp_path / "voter"
    stable.save(path, FULL)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert isinstance(stable.load(path), stable.LostDisk), length


@settings(deadline=None)  # it waits for a real disk
@given(st.data())
def test_a_changed_byte_is_a_lost_disk(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("disk") / "voter"
    stable.save(path, FULL)
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    assert isinstance(stable.load(path), stable.LostDisk)


def test_a_sound_file_with_another_content_is_a_lost_disk(tmp_path: Path) -> None:
    path = tmp_path / "voter"
    for text in (b"{}", b"[1]", b'{"cluster": 3', b"null"):
        path.write_bytes(b"\n".join((stable.FORM.encode(), hashlib.sha256(text).hexdigest().encode(), text)))
        assert isinstance(stable.load(path), stable.LostDisk), text


@pytest.mark.parametrize("fails_at", range(2))
def test_a_disk_that_fails_leaves_a_whole_state_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    path = tmp_path / "voter"
    before = stable.blank("home", "mini1", "7f")
    stable.save(path, before)
    real, calls = os.fsync, iter(range(9))

    def fsync(descriptor: int) -> None:
        if next(calls) == fails_at:
            raise OSError(5, "input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="input/output"):
        stable.save(path, FULL)
    assert stable.load(path) == (before if fails_at == 0 else FULL)


def test_the_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "voter", []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    stable.save(path, FULL)
    assert done == ["content", "rename", "folder"]


@pytest.mark.parametrize(("node", "nonce"), [("", "1"), ("mini1", ""), ("mini:1", "2"), ("mini1", "2:3")])
def test_a_voter_id_has_two_parts(node: str, nonce: str) -> None:
    with pytest.raises(ConfigError, match="nonce"):
        stable.blank("home", node, nonce)
