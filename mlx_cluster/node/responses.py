"""Stored responses between nodes: the service that offers this node's, and the way to the others'.

Owns: one unary call on the comms port, JSON both ways, with a deadline.
Does not own: what is kept (``gateway.shelf``), who is alive.
Invariant: a node that cannot be reached is ``Unavailable``; a typed error of the other side keeps its type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from mlx_cluster.errors import ClusterError, ConfigError, Unavailable
from mlx_cluster.gateway.shelf import Shelf
from mlx_cluster.wire import error_from_code

SERVICE = "mlx_cluster.Responses"
CALL_SECONDS = 10.0


class ResponsesService:
    def __init__(self, cluster: str, shelf: Shelf) -> None:
        self._cluster, self._shelf = cluster, shelf

    def add_to(self, server: grpc.aio.Server) -> None:
        handler = grpc.unary_unary_rpc_method_handler(self._ask)  # bytes as they are
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Ask": handler}),))

    async def _ask(self, message: bytes, _context: Any) -> bytes:
        try:
            asked = json.loads(message)
            if asked["cluster"] != self._cluster:
                raise ConfigError(f"this node belongs to the cluster {self._cluster!r}, not {asked['cluster']!r}")
            found = await self._shelf.serve(asked["operation"], asked["id"])
            return json.dumps({"found": found}).encode()
        except ClusterError as error:
            return json.dumps({"code": error.code, "message": str(error)}).encode()


class OtherNodes:
    """Implements ``gateway.shelf.Elsewhere``. ``addresses`` are comms ports, by node id."""

    def __init__(self, cluster: str, addresses: Mapping[int, str], channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._cluster, self._addresses, self._channel = cluster, addresses, channel

    async def ask(self, node_id: int, operation: str, response_id: str) -> Any:
        """See ``gateway.shelf.Elsewhere``."""
        address = self._addresses.get(node_id)
        if address is None:
            return None  # the cluster never had such a node
        call = self._channel(address).unary_unary(f"/{SERVICE}/Ask")
        message = {"cluster": self._cluster, "operation": operation, "id": response_id}
        try:
            answer = json.loads(await call(json.dumps(message).encode(), timeout=CALL_SECONDS))
        except grpc.aio.AioRpcError as error:
            raise Unavailable(
                f"node {node_id} keeps this response and cannot be reached ({error.code().name.lower()}): try later, "
                "or start the conversation again with its whole input"
            ) from error
        if "code" in answer:
            raise error_from_code(answer["code"], answer["message"])
        return answer["found"]
