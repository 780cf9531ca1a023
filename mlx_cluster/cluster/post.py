"""How voters' messages travel: one-way calls to the comms port of their node, from the voter's own thread.

Owns: one blocking-API channel for each address, the deadline of a call and how many may be under way.
Does not own: what is said (``election.messages``). Invariant: ``send`` never blocks; what cannot be delivered is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.values import node_of
from mlx_cluster.cluster.rpc import CHANNEL_OPTIONS, SERVICE

MAX_UNDER_WAY = 16  # for each node; a node that is away must not collect what is too old to matter


class VotePost:
    """``addresses`` are comms ports by the names of nodes in voter ids; ``dial`` says what to dial instead now."""

    def __init__(
        self,
        addresses: Mapping[str, str],
        cluster: str,
        timeout_seconds: float,
        dial: Callable[[str], str] = lambda address: address,
    ) -> None:
        self._addresses, self._dial = dict(addresses), dial
        self._cluster, self._timeout_seconds = cluster, timeout_seconds
        self._channels: dict[str, grpc.Channel] = {}
        for address in addresses.values():
            self._call(address)  # connects early
        self._under_way = dict.fromkeys(self._addresses, 0)
        self._lock = threading.Lock()  # calls end in threads of gRPC

    def send(self, message: Message) -> None:
        node = node_of(message.receiver)
        if node not in self._addresses:
            return
        with self._lock:
            if self._under_way[node] >= MAX_UNDER_WAY:
                return
            self._under_way[node] += 1
        call = self._call(self._dial(self._addresses[node]))
        request = cluster_pb2.VoteMessage(cluster=self._cluster, message_json=message.to_text())
        # A node that is just starting is waited for: the first word of an election should not cost a whole time-out.
        future = call.future(request, timeout=self._timeout_seconds, wait_for_ready=True)
        future.add_done_callback(lambda _: self._ended(node))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _call(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[address].unary_unary(
            f"/{SERVICE}/Vote",
            request_serializer=cluster_pb2.VoteMessage.SerializeToString,
            response_deserializer=cluster_pb2.Ack.FromString,
        )

    def _ended(self, node: str) -> None:
        with self._lock:
            self._under_way[node] -= 1
