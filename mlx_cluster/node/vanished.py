"""Whether a node that a heartbeat did not reach is gone: its machine answers, and nobody listens there any more.

Owns: the second look after a failed heartbeat. Does not own: what follows from it (``cluster.membership``).
Invariant: only a refused connection counts, at every address of the node and twice in a row. What is silent is left
to the deadline of heartbeats: a cable that is cut, a machine that is asleep and a process that is frozen look alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mlx_cluster.cluster.addresses import DialledAddresses

CONNECT_SECONDS = 0.5
AGAIN_SECONDS = 0.2  # between the two looks: one refusal may be a restart that has just ended


async def refuses(address: str) -> bool:
    """Whether the machine of ``host:port`` says that nobody listens there."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return False


class RefusalProbe:
    """``on_gone`` hears (node id, when the first look began) of a node that refused connections all the time since."""

    def __init__(
        self,
        addresses: DialledAddresses,
        on_gone: Callable[[int, float], None],
        clock: Callable[[], float],
        *,
        refuses: Callable[[str], Awaitable[bool]] = refuses,
        again_seconds: float = AGAIN_SECONDS,
    ) -> None:
        self._addresses, self._on_gone, self._clock = addresses, on_gone, clock
        self._refuses, self._again_seconds = refuses, again_seconds
        self._looking: dict[int, asyncio.Task[None]] = {}

    @property
    def looking(self) -> frozenset[int]:
        """Nodes that are being looked at."""
        return frozenset(self._looking)

    def look(self, node_id: int) -> None:
        """A heartbeat could not be delivered: look whether the node is gone, unless that is being done."""
        if node_id not in self._looking:
            task = asyncio.create_task(self._look(node_id), name=f"refusals of node {node_id}")
            self._looking[node_id] = task
            task.add_done_callback(lambda _: self._looking.pop(node_id, None))

    def stop(self) -> None:
        for task in list(self._looking.values()):
            task.cancel()

    async def _look(self, node_id: int) -> None:
        began = self._clock()
        if not await self._all_refuse(node_id):
            return
        await asyncio.sleep(self._again_seconds)
        if await self._all_refuse(node_id):
            self._on_gone(node_id, began)

    async def _all_refuse(self, node_id: int) -> bool:
        candidates = self._addresses.ranked[node_id].candidates
        return all(await asyncio.gather(*(self._refuses(address) for address in candidates)))
