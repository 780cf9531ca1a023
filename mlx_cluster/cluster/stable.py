"""The durable state of one voter: one file, written as one.

Owns: the file's form, its checksum, the order of write, sync and rename. Does not own: what is written (``election``)
or which thread waits for the disk.
Invariant: after a crash at any moment ``load`` finds either the state before or the state after ``save``, or says that
the disk is lost; it never returns anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_cluster.cluster.election.values import Durable
from mlx_cluster.errors import ConfigError

FORM = "mlx-cluster voter 1"  # first word of the file: another form is another file, not a torn one


@dataclass(frozen=True, slots=True)
class LostDisk:
    """There is no state to go on with. The voter id that lived here must never be used again."""

    reason: str


def load(path: Path) -> Durable | LostDisk:
    """What the last finished ``save`` wrote. Raises ``OSError`` when the disk cannot be read at all."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return LostDisk(f"{path} is missing")
    head, _, rest = raw.partition(b"\n")
    digest, _, text = rest.partition(b"\n")
    if head.decode(errors="replace") != FORM:
        return LostDisk(f"{path} does not begin with {FORM!r}")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return LostDisk(f"{path} is torn: its checksum does not fit its {len(text)} bytes")
    try:
        return Durable.from_json(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        return LostDisk(f"{path} holds no voter's state: {error!r}")


def save(path: Path, durable: Durable) -> None:
    """Write the state so that a loss of power leaves the old one or the new one; blocks until it is on the disk.

    Raises ``OSError`` when it is not: the caller must then not say that it was.
    """
    text = json.dumps(durable.to_json(), separators=(",", ":"), allow_nan=False).encode()
    raw = b"\n".join((FORM.encode(), hashlib.sha256(text).hexdigest().encode(), text))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.fresh")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(raw)
        file.flush()
        _to_the_platter(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def blank(cluster: str, node: str, nonce: str) -> Durable:
    """The state of a voter that has never voted. ``nonce`` must be fresh: it makes the voter id, for good."""
    if not node or not nonce or ":" in node + nonce:
        raise ConfigError(f"a voter id is made of a node's name and a nonce without ':', not {node!r} and {nonce!r}")
    return Durable(cluster=cluster, voter=f"{node}:{nonce}")


def _to_the_platter(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # fsync on macOS stops at the drive's own cache. Some network file systems know nothing better.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
