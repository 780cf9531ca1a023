"""Entries on a disk: the same caches come back, or none; what is damaged or another slice's is never used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_cluster.microbatch import Saved
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model.prefix import Entries
from mlx_cluster.model.prefix_disk import PrefixDisk

SAVED = Saved(bytes(range(16)), "tenant", (3, 1, 2))
LARGE = 1 << 30

KINDS: dict[str, Callable[[], Any]] = {
    "kv": KVCache,
    "quantized": QuantizedKVCache,
    "window": lambda: RotatingKVCache(4),
    "arrays": lambda: ArraysCache(2),
    "list": lambda: CacheList(KVCache(), ArraysCache(2)),
}


def grown(kind: str, length: int, dtype: mx.Dtype = mx.float32) -> Any:
    cache = KINDS[kind]()
    for position in range(length):
        for part in row_cache.parts([cache]):
            if isinstance(part, ArraysCache):
                part[0], part[1] = part[1], mx.array([[position]], dtype=dtype)
            else:
                keys = mx.full((1, 2, 1, 64), position, dtype=dtype)
                part.update_and_fetch(keys, keys + 1)
    return cache


def assert_same(one: Any, other: Any) -> None:
    """Whatever both go on to do, they start from equal attributes."""
    for mine, theirs in zip(row_cache.parts([one]), row_cache.parts([other]), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
        for name, value in vars(mine).items():
            expect_equal(value, vars(theirs)[name])


def expect_equal(value: Any, other: Any) -> None:
    assert type(value) is type(other)
    if isinstance(value, mx.array):
        assert value.dtype == other.dtype
        assert mx.array_equal(value, other).item()
    elif isinstance(value, tuple | list):
        for mine, theirs in zip(value, other, strict=True):
            expect_equal(mine, theirs)
    else:
        assert value == other


def saved_file(root: Path, fingerprint: str = "m") -> Path:
    disk = PrefixDisk(root, LARGE, fingerprint)
    disk.save(SAVED, row_cache.copied([grown("kv", 3)]), 3)
    disk.flush()
    (path,) = root.glob("*/*.safetensors")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_what_comes_back_is_what_was_kept(kind: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    entries = Entries(lambda: [KINDS[kind]()])
    entries.disk = PrefixDisk(tmp_path, LARGE, "m")
    entries.store(1, [grown(kind, 6, dtype)], 6, SAVED)
    entries.disk.flush()
    expected = entries.load(1, 6)
    assert expected is not None
    later = Entries(lambda: [KINDS[kind]()])
    later.disk = PrefixDisk(tmp_path, LARGE, "m")
    assert later.disk.entries() == [SAVED]
    assert later.load(5, 6) is None, "only a digest asks for the disk"
    loaded = later.load(5, 6, SAVED.digest)
    assert loaded is not None
    assert_same(loaded[0], expected[0])
    later.evict(5)
    assert later.load(5, 6, SAVED.digest) is not None, "leaving memory is not leaving the disk"


def test_mlx_itself_can_read_a_file(tmp_path: Path) -> None:
    arrays, metadata = mx.load(str(saved_file(tmp_path)), return_metadata=True)  # type: ignore[misc]
    assert metadata["salt"] == "tenant"  # type: ignore[index,call-overload]
    assert arrays["0"].shape == (1, 2, 3, 64)  # type: ignore[index,union-attr,call-overload]


def test_a_part_of_it_is_enough(tmp_path: Path) -> None:
    saved_file(tmp_path)
    entries = Entries(lambda: [KVCache()])
    entries.disk = PrefixDisk(tmp_path, LARGE, "m")
    loaded = entries.load(1, 2, SAVED.digest)
    assert loaded is not None
    assert loaded[0].offset == 2


@pytest.mark.parametrize("fingerprint", ["another model", "m/other layers"])
def test_another_slices_files_are_not_seen(fingerprint: str, tmp_path: Path) -> None:
    path = saved_file(tmp_path)
    disk = PrefixDisk(tmp_path, LARGE, fingerprint)
    assert disk.entries() == []
    assert disk.load(SAVED.digest, [KVCache()]) is None
    assert path.exists()


def test_caches_of_another_kind_are_not_filled(tmp_path: Path) -> None:
    path = saved_file(tmp_path)
    assert PrefixDisk(tmp_path, LARGE, "m").load(SAVED.digest, [RotatingKVCache(4)]) is None
    assert not path.exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1],
    "header only": lambda data: data[:40],
    "empty": lambda _data: b"",
    "longer": lambda data: data + b"x",
    "a bit of the data": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
    "no JSON": lambda data: data[:8] + b"\x00" + data[9:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_removed_with_a_warning(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved_file(tmp_path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    disk = PrefixDisk(tmp_path, LARGE, "m")
    assert disk.load(SAVED.digest, [KVCache()]) is None
    assert not path.exists()
    assert disk.entries() == []
    out = capfd.readouterr()
    assert "cannot be used and is removed" in out.out + out.err


def test_a_file_under_another_entrys_name_is_not_used(tmp_path: Path) -> None:
    path = saved_file(tmp_path)
    other = bytes(16)
    path.rename(path.with_name(other.hex() + ".safetensors"))
    assert PrefixDisk(tmp_path, LARGE, "m").load(other, [KVCache()]) is None


def test_what_was_not_finished_is_swept(tmp_path: Path) -> None:
    path = saved_file(tmp_path)
    left = path.with_name("abc.1.unfinished")
    left.write_bytes(b"half")
    assert PrefixDisk(tmp_path, LARGE, "m").entries() == [SAVED]
    assert not left.exists()


def test_the_bytes_of_all_files_are_bounded_the_least_recently_used_go(tmp_path: Path) -> None:
    foreign = saved_file(tmp_path, "another model")
    size = foreign.stat().st_size
    disk = PrefixDisk(tmp_path, 2 * size + size // 2, "m")
    names = [Saved(bytes([n]) * 16) for n in range(3)]
    for at, saved in enumerate(names[:2]):
        os.utime(foreign, (1, 1))
        disk.save(saved, row_cache.copied([grown("kv", 3)]), 3)
        disk.flush()
        (written,) = tmp_path.glob(f"*/{saved.digest.hex()}.safetensors")
        os.utime(written, (10 + at, 10 + at))
    assert not foreign.exists(), "nobody used it for longest"
    assert disk.load(names[0].digest, [KVCache()]) is not None, "used now"
    disk.save(names[2], row_cache.copied([grown("kv", 3)]), 3)
    disk.flush()
    assert {saved.digest for saved in disk.entries()} == {names[0].digest, names[2].digest}
