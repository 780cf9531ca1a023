"""Ports for mlx backends, leased from a range that the processes of one machine share.

Owns: which port of ``network.mlx_port_range`` a stage gets. mlx's ring cannot bind port 0, so somebody must know a free
port before the stage process binds it.
Invariant: two agents of one machine never hold the same lease: a lease is a lock on a file, which the kernel drops when
the agent dies.
"""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlx_cluster.config.ports import is_free
from mlx_cluster.errors import LinkUnavailable


@dataclass(slots=True)
class Lease:
    """A port that is ours until ``release``."""

    port: int
    _descriptor: int | None

    def release(self) -> None:
        """Give the port back. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class PortLeases:
    """Leases from one range. A random start keeps a fresh epoch off the ports that the last one just left."""

    def __init__(self, low: int, high: int, folder: Path | None = None, seed: int | None = None) -> None:
        self._low, self._high = low, high
        self._folder = folder or Path(tempfile.gettempdir()) / f"mlx-cluster-ports-{os.getuid()}"
        self._random = random.Random(seed)  # which port is taken is no secret

    def lease(self, host: str) -> Lease:
        """A port on ``host`` that nobody listens on and no other agent holds. Raises ``LinkUnavailable``."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        count = self._high - self._low + 1
        start = self._random.randrange(count)
        for offset in range(count):
            port = self._low + (start + offset) % count
            descriptor = self._lock(port)
            if descriptor is None:
                continue
            if is_free(host, port):
                return Lease(port, descriptor)
            os.close(descriptor)
        raise LinkUnavailable(
            f"every port of network.mlx_port_range [{self._low}, {self._high}] is taken on {host}: widen the range"
        )

    def _lock(self, port: int) -> int | None:
        descriptor = os.open(self._folder / str(port), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor
