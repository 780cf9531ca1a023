"""The other nodes, as this one reaches them.

Owns: one channel per address, for control and for engines alike; per node, what its failures teach (``guarded``).
A channel is asked for by the address that everybody knows, and leads to the one that is dialled at present.
Does not own: who is alive.
Invariant: a channel that lost its peer connects again by itself; ``close`` ends all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping

import grpc

from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.addresses import DialledAddresses
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.guarded import GuardedCalls
from mlx_cluster.cluster.retry import BreakerState
from mlx_cluster.cluster.rpc import ClusterClient, ClusterHandler, open_channel
from mlx_cluster.engine.remote import RemoteEngine
from mlx_cluster.node.responses import OtherNodes
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.request import Engine


class Peers:
    """``addresses`` are the comms ports of the other nodes, ``names`` theirs, by node id.

    ``on_circuit`` hears (node's name, state, why) when calls to a node are no longer tried, or again.
    """

    def __init__(
        self,
        cluster: str,
        addresses: DialledAddresses,
        names: Mapping[int, str],
        on_circuit: Callable[[str, BreakerState, str], None],
    ) -> None:
        self._cluster, self._addresses, self._names = cluster, addresses, names
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._guards = {i: GuardedCalls(names[i], on_transition=on_circuit) for i in addresses}

    def client(self, node_id: int) -> ClusterClient:
        channel = self._open(self._addresses[node_id])
        return ClusterClient(channel, self._cluster, self._names[node_id], self._guards[node_id])

    def heard(self, node_id: int) -> None:
        """A heartbeat of this node arrived: calls to it are worth trying again."""
        if node_id in self._guards:
            self._guards[node_id].heard()

    async def put_document(self, node_id: int, document: ClusterDocument) -> None:
        await self.client(node_id).put_document(document)

    def remote_engine(self, address: str, pipeline: str) -> Engine:
        """The engine of a pipeline on the node whose comms port this is."""
        return RemoteEngine(self.channel(address), pipeline)

    def other_responses(self) -> OtherNodes:
        """The stored responses of the other nodes."""
        return OtherNodes(self._cluster, self._addresses, self.channel)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to the node of this comms address."""
        return self._open(self._addresses.instead_of(address))

    def _open(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]


class OwnAgent:
    """This node's agent as its own drivers ask it: nothing in between. Implements ``bringup.StageAgent``."""

    def __init__(self, handler: ClusterHandler) -> None:
        self._handler = handler

    async def start_stage(
        self, plan: Plan, index: int, epoch: Epoch, fresh: bool, timeout_seconds: float
    ) -> AsyncGenerator[cluster_pb2.StageProgress]:
        """The deadline is the stage process's own here."""
        starting = self._handler.start_stage(plan, index, epoch, fresh)
        async with contextlib.aclosing(starting):
            async for progress in starting:
                yield progress

    async def link_stage(self, request: cluster_pb2.LinkStageRequest, timeout_seconds: float) -> None:
        await self._handler.link_stage(request)

    async def stop_stage(self, pipeline: str, index: int, epoch: Epoch, reason: str) -> None:
        await self._handler.stop_stage(pipeline, index, epoch, reason)
