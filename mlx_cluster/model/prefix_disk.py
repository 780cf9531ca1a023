"""Entries of the prefix cache on the disk of one stage: they survive a restart.

Owns: the files of this slice (safetensors, one for each entry), their checksums, their number of bytes, and the thread
that writes them.
Does not own: which entries exist or are used (the engine says so), or what they look like in memory
(``model.prefix``).
Invariant: a file is whole or it is not used. It appears under its name in one step, what is read is compared with its
checksum, and whatever does not fit is removed with a warning. Files of another model, slice, precision or kind of
caches lie in another folder and are never read.

The writer only reads arrays that were given to ``async_eval``; nothing here adds to a graph outside the mlx thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cluster import log
from mlx_cluster.microbatch import Saved, TensorSpec
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import state
from mlx_cluster.model.cache import Caches

FORMAT = 1
SUFFIX = ".safetensors"
_UNFINISHED = ".unfinished"
# Entries that wait to be written; when the disk is slower than that, further ones stay in memory only.
MAX_UNWRITTEN = 16
_MAX_HEADER_BYTES = 64 * 1024 * 1024
_HEADER_LENGTH = struct.Struct("<Q")
# safetensors' names of dtypes, by mlx's.
_DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "uint32": "U32",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_MLX_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

logger = log.get("model.prefix_disk")


class _Unusable(Exception):
    """Why a file cannot be used."""


@dataclass(frozen=True, slots=True)
class _Unwritten:
    saved: Saved
    positions: int
    layout: str
    tensors: tuple[TensorSpec, ...]
    payloads: tuple[Any, ...]  # flat uint8 arrays with the buffer protocol


class PrefixDisk:
    """The entries of one slice below ``root``, where several stages may keep theirs.

    ``fingerprint`` names everything that an entry depends on beside its tokens. ``max_bytes`` bounds all files below
    ``root``: those that were not used for longest go first, whoever they belong to.
    """

    def __init__(self, root: Path, max_bytes: int, fingerprint: str) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._folder = root / hashlib.blake2b(f"{FORMAT}/{fingerprint}".encode(), digest_size=16).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = f".{os.getpid()}{_UNFINISHED}"
        self._unwritten: queue.Queue[_Unwritten | None] = queue.Queue(MAX_UNWRITTEN)
        threading.Thread(target=self._write_always, name="prefix-disk", daemon=True).start()

    def entries(self) -> list[Saved]:
        """What lies here, the most recently used last. Files that are not whole are removed."""
        for path in self._folder.glob(f"*{_UNFINISHED}"):
            if not path.name.endswith(self._unfinished):  # what this process is writing will be whole
                path.unlink(missing_ok=True)
        found = sorted(self._folder.glob(f"*{SUFFIX}"), key=_used_at)
        listed = [self._checked(path, lambda path: _read_header(path).saved) for path in found]
        return [saved for saved in listed if saved is not None]

    def save(self, saved: Saved, caches: Caches, positions: int) -> None:
        """Write an entry soon. On the mlx thread; ``caches`` are evaluated or on their way, and never change."""
        if self._path(saved.digest).exists():
            return
        arrays: list[mx.array] = []
        layout = json.dumps([[type(part).__name__, _flat(vars(part), arrays)] for part in row_cache.parts(caches)])
        payloads = tuple(state.as_bytes([array]) for array in arrays)
        _async_eval(payloads)
        tensors = tuple(state.spec_of(array) for array in arrays)
        try:
            self._unwritten.put_nowait(_Unwritten(saved, positions, layout, tensors, payloads))
        except queue.Full:
            logger.warning("the disk is too slow for the prefix cache: an entry is not written", positions=positions)

    def load(self, digest: bytes, empty: Caches) -> tuple[Caches, int] | None:
        """The entry's caches, made of ``empty`` ones, and their positions. On the mlx thread."""
        path = self._path(digest)
        if not path.exists():
            return None
        loaded = self._checked(path, lambda path: _read(path, empty))
        if loaded is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # it was used now
        return loaded

    def close(self) -> None:
        """End the thread that writes, behind what is left to be written."""
        self._unwritten.put(None)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._unwritten.join()

    def _path(self, digest: bytes) -> Path:
        return self._folder / (digest.hex() + SUFFIX)

    def _checked(self, path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except (_Unusable, OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            logger.warning("a file of the prefix cache cannot be used and is removed", file=path.name, why=str(error))
            path.unlink(missing_ok=True)
            return None

    # -- writer thread --------------------------------------------------------------------------------

    def _write_always(self) -> None:
        while (item := self._unwritten.get()) is not None:
            try:
                self._write(item)
                self._make_room()
            except (
                OSError,
                RuntimeError,
                KeyError,
            ) as error:  # a full disk, a failed computation, a dtype without a name
                logger.warning("an entry of the prefix cache is not written", folder=str(self._folder), why=str(error))
            finally:
                self._unwritten.task_done()

    def _write(self, item: _Unwritten) -> None:
        buffers = [memoryview(payload).cast("B") for payload in item.payloads]
        header = _header(item, _checksum(buffers))
        unfinished = self._folder / f"{item.saved.digest.hex()}{self._unfinished}"
        try:
            with unfinished.open("wb") as file:
                file.write(_HEADER_LENGTH.pack(len(header)) + header)
                for buffer in buffers:
                    file.write(buffer)
            unfinished.replace(self._path(item.saved.digest))
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self) -> None:
        files = sorted((_used_at(path), _size(path), path) for path in self._root.glob(f"*/*{SUFFIX}"))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in files:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


_async_eval: Any = mx.async_eval  # its types do not cover trees


# -- the layout of a file ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    saved: Saved
    positions: int
    layout: Any
    checksum: str
    tensors: tuple[tuple[TensorSpec, int, int], ...]  # with where they begin and end
    data_at: int


def _header(item: _Unwritten, checksum: str) -> bytes:
    described: dict[str, Any] = {
        "__metadata__": {
            "digest": item.saved.digest.hex(),
            "salt": item.saved.salt,
            "tokens": json.dumps(item.saved.tokens, separators=(",", ":")),
            "positions": str(item.positions),
            "layout": item.layout,
            "checksum": checksum,
        }
    }
    at = 0
    for index, spec in enumerate(item.tensors):
        end = at + state.num_bytes(spec)
        described[str(index)] = {"dtype": _DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _read_header(path: Path) -> _Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
        if length > min(size, _MAX_HEADER_BYTES):
            raise _Unusable("it is cut off")
        described = json.loads(file.read(length))
    words = described.pop("__metadata__")
    tensors = []
    for index in range(len(described)):
        tensor = described[str(index)]
        spec = TensorSpec(_MLX_DTYPES[tensor["dtype"]], tuple(map(int, tensor["shape"])))
        begin, end = map(int, tensor["data_offsets"])
        if end - begin != state.num_bytes(spec):
            raise _Unusable("its description contradicts itself")
        tensors.append((spec, begin, end))
    data_at = _HEADER_LENGTH.size + length
    if data_at + max((end for *_, end in tensors), default=0) != size:
        raise _Unusable("it is cut off")
    saved = Saved(bytes.fromhex(words["digest"]), words["salt"], tuple(map(int, json.loads(words["tokens"]))))
    if saved.digest.hex() != path.name.removesuffix(SUFFIX):
        raise _Unusable("it has another entry's name")
    return _Header(
        saved, int(words["positions"]), json.loads(words["layout"]), words["checksum"], tuple(tensors), data_at
    )


def _read(path: Path, empty: Caches) -> tuple[Caches, int]:
    header = _read_header(path)
    data = memoryview(path.read_bytes())[header.data_at :]
    buffers = [data[begin:end] for _, begin, end in header.tensors]
    if _checksum(buffers) != header.checksum:
        raise _Unusable("its checksum is wrong")
    arrays = [state.array_from(spec, buffer) for (spec, *_), buffer in zip(header.tensors, buffers, strict=True)]
    parts = list(row_cache.parts(empty))
    if [name for name, _ in header.layout] != [type(part).__name__ for part in parts]:
        raise _Unusable("its caches are of other kinds")
    for part, (_, values) in zip(parts, header.layout, strict=True):
        vars(part).update(_filled(values, arrays))
    mx.eval(arrays)
    return empty, header.positions


def _checksum(buffers: Sequence[memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _flat(value: Any, arrays: list[mx.array]) -> Any:
    """A cache's attributes as JSON, arrays by their number. Raises ``TypeError`` for anything unforeseen."""
    if isinstance(value, mx.array):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_flat(each, arrays) for each in value]}
    if isinstance(value, dict):
        return {"dict": {key: _flat(each, arrays) for key, each in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a cache holds a {type(value).__name__}, which cannot be written to a file")


def _filled(value: Any, arrays: Sequence[mx.array]) -> Any:
    """Inverse of ``_flat``."""
    match value:
        case {"array": int(index)}:
            return arrays[index]
        case {"tuple": list(items)}:
            return tuple(_filled(each, arrays) for each in items)
        case {"list": list(items)}:
            return [_filled(each, arrays) for each in items]
        case {"dict": dict(items)}:
            return {key: _filled(each, arrays) for key, each in items.items()}
        case None | bool() | int() | float() | str():
            return value
    raise _Unusable("its description cannot be understood")


def _used_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
