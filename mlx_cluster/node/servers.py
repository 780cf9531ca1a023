"""Everything of a node that listens: gRPC comms, gateway, node API, health, admin, and the coordinator's port.

Owns: binding and closing, in order. Does not own: what is answered (``agent``, ``http``, ``gateway``).
Invariant: a port that is taken is a ``PortInUse`` that names the port and its use; only the coordinator's port is
waited for, because its last holder may still be leaving.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from mlx_cluster import log
from mlx_cluster.cluster.rpc import ClusterService
from mlx_cluster.config.ports import is_free
from mlx_cluster.engine.remote import EngineService
from mlx_cluster.errors import PortInUse
from mlx_cluster.gateway.app import NodeInfo, create_app
from mlx_cluster.gateway.server import GatewayServer
from mlx_cluster.node.agent import Agent
from mlx_cluster.node.copies import weights_service
from mlx_cluster.node.http import admin_app, health_app, node_app, operator_routes
from mlx_cluster.node.operator import Operator
from mlx_cluster.node.responses import ResponsesService
from mlx_cluster.node.routes import NodeRoutes
from mlx_cluster.wire import GRPC_OPTIONS

HTTP_GRACE_SECONDS = 0.5
COORDINATOR_RETRY_SECONDS = 1.0

_log = log.get(__name__)


class NodeServers:
    """The listeners of one agent: ``start`` binds all, ``run`` holds the coordinator's port while the node leads."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        identity, settings = agent.identity, agent.settings
        metrics = agent.metrics
        metrics.watch_engines(agent.drivers.statistics)
        routes = NodeRoutes(
            settings.models,
            agent.models,
            agent.picture,
            agent.drivers.engine,
            agent.peers.remote_engine,
            agent.pipeline_watch.has_served,
        )
        self._admin = admin_app(
            settings.cluster.name, settings, agent.picture, routes, agent.office, operator_routes(Operator(agent))
        )
        info = NodeInfo(identity.node_id, identity.name, settings.cluster.name, agent.version)
        self._gateway = create_app(
            routes, settings.api_gateway, info, metrics, identity.state_dir, agent.peers.other_responses()
        )
        bind, ports = identity.bind_host, identity.ports
        self._http = [
            GatewayServer(self._gateway, identity.gateway_host, ports.gateway),
            GatewayServer(node_app(lambda: agent.status, agent.drivers.statistics), bind, ports.node_api),
            GatewayServer(health_app(lambda: agent.status, routes, metrics), bind, ports.health),
            GatewayServer(self._admin, bind, ports.admin),
        ]
        self._comms: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Bind everything. Raises ``PortInUse`` or ``ConfigError``; what was bound is closed by ``stop``."""
        await self._start_comms()
        for server in self._http:
            await server.start()

    async def run(self) -> None:
        """Load tokenizers ahead of the first request, and hold the coordinator's port while this node leads."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._gateway.state.gateway.catalogue.warm(), name="warm tokenizers")
            group.create_task(self._hold_coordinator_port(), name="coordinator's port")

    async def drain(self, seconds: float) -> None:
        """Take no new requests here, and return when the running ones are done, or the time is over."""
        await self._http[0].stop(seconds)

    async def stop(self) -> None:
        """Close all; running answers have ``HTTP_GRACE_SECONDS``."""
        closing: list[Any] = [server.stop(HTTP_GRACE_SECONDS) for server in self._http]
        if self._comms is not None:
            closing.append(self._comms.stop(HTTP_GRACE_SECONDS))
        await asyncio.gather(*closing)

    async def _start_comms(self) -> None:
        agent, bind, port = self._agent, self._agent.identity.bind_host, self._agent.identity.ports.comms
        # gRPC's own message for a taken port does not say which program wants it, so ask first.
        if not is_free(bind, port):
            raise PortInUse(
                f"port {port} on {bind} is taken by another program, {agent.identity.name}'s comms wants it"
            )
        self._comms = grpc.aio.server(options=GRPC_OPTIONS)
        ClusterService(agent, agent.settings.cluster.name, agent.version).add_to(self._comms)
        EngineService(agent.drivers.resolve).add_to(self._comms)
        ResponsesService(agent.settings.cluster.name, self._gateway.state.shelf).add_to(self._comms)
        weights_service(agent.settings.cluster.name, agent.models).add_to(self._comms)
        try:
            self._comms.add_insecure_port(f"{bind}:{port}")
        except RuntimeError as error:
            raise PortInUse(
                f"port {port} on {bind} cannot be bound for {agent.identity.name}'s comms: {error}"
            ) from error
        await self._comms.start()

    async def _hold_coordinator_port(self) -> None:
        bind, port = self._agent.identity.bind_host, self._agent.settings.coordinator.port
        held: GatewayServer | None = None
        try:
            while True:
                if self._agent.leads and held is None:
                    server = GatewayServer(self._admin, bind, port)
                    with contextlib.suppress(PortInUse):
                        await server.start()
                        held = server
                        _log.info("coordinator's port bound", port=port)
                elif not self._agent.leads and held is not None:
                    await held.stop(HTTP_GRACE_SECONDS)
                    held = None
                await asyncio.sleep(COORDINATOR_RETRY_SECONDS)
        finally:
            if held is not None:
                await held.stop(HTTP_GRACE_SECONDS)
