"""mx.distributed links. (Being built.)"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mlx_cluster.transport.link import ReceiveEnd, SendEnd, StagePosition


class MlxGroup:
    @classmethod
    async def open(
        cls,
        backend: str,
        position: StagePosition,
        addresses: Sequence[str],
        run_on_owner: Callable[[Callable[[], Any]], Awaitable[Any]],
        timeout_seconds: float,
    ) -> MlxGroup:
        raise NotImplementedError

    def sender(self, notes: SendEnd) -> SendEnd:
        raise NotImplementedError

    def receiver(self, notes: ReceiveEnd) -> ReceiveEnd:
        raise NotImplementedError
