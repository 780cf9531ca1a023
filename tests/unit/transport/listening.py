"""A server on a free port of loopback that receives hidden states."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from mlx_cluster import wire
from mlx_cluster.transport.grpc_link import HiddenStates


@asynccontextmanager
async def listening(hidden: HiddenStates) -> AsyncIterator[str]:
    """Its address, for the time of the block."""
    server = grpc.aio.server(options=wire.GRPC_OPTIONS)
    hidden.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
