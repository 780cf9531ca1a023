"""How voters' messages travel: one-way calls to the comms port of their node, from the voter's own thread.

Owns: one blocking-API channel for each node, the deadline of a call and how many may be under way.
Does not own: what is said (``election.messages``). Invariant: ``send`` never blocks; what cannot be delivered is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import grpc

from mlx_cluster._pb import cluster_pb2
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.values import node_of
from mlx_cluster.cluster.rpc import CHANNEL_OPTIONS, SERVICE

MAX_UNDER_WAY = 16  # for each node; a node that is away must not collect what is too old to matter


class VotePost:
    """``addresses`` are comms ports by the names of nodes in voter ids."""

    def __init__(self, addresses: Mapping[str, str], cluster: str, timeout_seconds: float) -> None:
        self._cluster, self._timeout_seconds = cluster, timeout_seconds
        self._channels = {
            node: grpc.insecure_channel(address, options=CHANNEL_OPTIONS) for node, address in addresses.items()
        }
        self._calls: dict[str, Any] = {
            node: channel.unary_unary(
                f"/{SERVICE}/Vote",
                request_serializer=cluster_pb2.VoteMessage.SerializeToString,
                response_deserializer=cluster_pb2.Ack.FromString,
            )
            for node, channel in self._channels.items()
        }
        self._under_way = dict.fromkeys(self._calls, 0)
        self._lock = threading.Lock()  # calls end in threads of gRPC

    def send(self, message: Message) -> None:
        node = node_of(message.receiver)
        call = self._calls.get(node)
        if call is None:
            return
        with self._lock:
            if self._under_way[node] >= MAX_UNDER_WAY:
                return
            self._under_way[node] += 1
        request = cluster_pb2.VoteMessage(cluster=self._cluster, message_json=message.to_text())
        # A node that is just starting is waited for: the first word of an election should not cost a whole time-out.
        future = call.future(request, timeout=self._timeout_seconds, wait_for_ready=True)
        future.add_done_callback(lambda _: self._ended(node))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _ended(self, node: str) -> None:
        with self._lock:
            self._under_way[node] -= 1
