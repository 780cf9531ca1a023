"""Which port each node uses for what, decided before anything starts.

Owns: the plan of ports, the search for clashes in it and the check that the ports are free on this machine.
Does not own: binding them. Invariant: no two uses in a plan share a host and port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_cluster.config.names import node_name
from mlx_cluster.config.schema import NodeEntry, Settings
from mlx_cluster.errors import ConfigError, PortInUse

FIRST_BASE_PORT = 8100
PORTS_PER_NODE = 100
RESERVED = range(8400, 8500)  # the coordinator's block: no node's base falls in it
OFFSETS = {"node API": 0, "comms": 1, "health": 2, "stage": 3, "admin": 4}


@dataclass(frozen=True, slots=True)
class NodePorts:
    """``base`` + 0…4 unless cluster.yaml says otherwise, and the gateway's port."""

    node_api: int
    comms: int
    health: int
    stage: int
    admin: int
    gateway: int

    def uses(self) -> dict[str, int]:
        return {
            "node API": self.node_api,
            "comms": self.comms,
            "health": self.health,
            "stage": self.stage,
            "admin": self.admin,
            "gateway": self.gateway,
        }


@dataclass(frozen=True, slots=True)
class PortUse:
    """What wants a port, for a person to read: ``mini1's gateway``."""

    host: str
    port: int
    wanted_by: str


def base_port(index: int, first: int = FIRST_BASE_PORT, coordinator_port: int = RESERVED.start) -> int:
    """Base of the node in place ``index``: every hundred from ``first``, without the coordinator's block."""
    base = first
    for _ in range(index):
        base = _next_free_base(base + PORTS_PER_NODE, coordinator_port)
    return base


def _next_free_base(base: int, coordinator_port: int) -> int:
    while any(port in RESERVED or port == coordinator_port for port in range(base, base + len(OFFSETS))):
        base += PORTS_PER_NODE
    return base


def plan_ports(settings: Settings) -> dict[int, NodePorts]:
    """Ports of every node, by node id. Raises ``ConfigError`` when two uses clash or a port is above 65535.

    Nodes that share a host have their gateways on consecutive ports, in order of node ids.
    """
    planned: dict[int, NodePorts] = {}
    on_host: dict[str, int] = {}
    for entry in sorted(settings.cluster.nodes, key=lambda e: e.node_id):
        place = on_host.get(entry.host, 0)
        on_host[entry.host] = place + 1
        planned[entry.node_id] = _ports_of(entry, settings.api_gateway.port + place, settings.coordinator.port)
    check_clashes(uses(settings, planned), settings)
    return planned


def _ports_of(entry: NodeEntry, gateway: int, coordinator_port: int) -> NodePorts:
    base = entry.ports[0] if entry.ports else base_port(entry.node_id, coordinator_port=coordinator_port)
    given = dict(enumerate(entry.ports))
    numbers = [given.get(offset, base + offset) for offset in OFFSETS.values()]
    if too_high := [port for port in (*numbers, gateway) if port > 65535]:
        raise ConfigError(
            f"{node_name(entry)} would need port {too_high[0]}, the highest is 65535: choose a lower base port",
            key="cluster.nodes",
        )
    node_api, comms, health, stage, admin = numbers
    return NodePorts(node_api, comms, health, stage, admin, gateway)


def uses(settings: Settings, planned: dict[int, NodePorts], node_ids: Iterable[int] | None = None) -> list[PortUse]:
    """What the nodes (default: all) want, for ``check_clashes`` and ``check_free``."""
    wanted = set(planned if node_ids is None else node_ids)
    return [
        PortUse(entry.host, port, f"{node_name(entry)}'s {what}")
        for entry in settings.cluster.nodes
        if entry.node_id in wanted
        for what, port in planned[entry.node_id].uses().items()
    ]


def witness_use(settings: Settings) -> list[PortUse]:
    """What the witness wants, where it runs on the nodes' own machine."""
    witness = settings.cluster.witness
    return [] if witness is None else [PortUse(witness.host, witness.port, "the witness (cluster.witness.port)")]


def check_clashes(wanted: Iterable[PortUse], settings: Settings) -> None:
    """Raise ``ConfigError`` when a port is wanted twice on a host, or lies in a range that serves something else."""
    taken: dict[tuple[str, int], str] = {}
    low, high = settings.network.mlx_port_range
    if low > high:
        raise ConfigError(
            f"network.mlx_port_range [{low}, {high}] runs backwards: give the lower port first",
            key="network.mlx_port_range",
        )
    for use in wanted:
        other = taken.setdefault((use.host, use.port), use.wanted_by)
        if other is not use.wanted_by:
            raise ConfigError(
                f"port {use.port} on {use.host} is wanted twice: {other} and {use.wanted_by}; "
                "change cluster.nodes[].ports or api_gateway.port",
                key="cluster.nodes",
            )
        if use.port == settings.coordinator.port:
            raise ConfigError(
                f"port {use.port} on {use.host} is wanted twice: {use.wanted_by} and the coordinator "
                "(coordinator.port); change one of them",
                key="coordinator.port",
            )
        if low <= use.port <= high:
            raise ConfigError(
                f"port {use.port} ({use.wanted_by}) lies in network.mlx_port_range [{low}, {high}], which the ring "
                "leases from; move one of them",
                key="network.mlx_port_range",
            )


def check_free(wanted: Iterable[PortUse]) -> None:
    """Raise ``PortInUse`` for the first port that another program listens on; all are on this machine."""
    for use in wanted:
        if not is_free(use.host, use.port):
            option = "--gateway-port" if use.wanted_by.endswith("gateway") else "--base-port"
            raise PortInUse(
                f"port {use.port} on {use.host} is taken, {use.wanted_by} wants it: stop the program that holds it "
                f"(lsof -nP -iTCP:{use.port} -sTCP:LISTEN shows it) or choose another with {option}"
            )


def is_free(host: str, port: int) -> bool:
    """Whether this machine could listen on host:port now."""
    address = _bindable(host)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
        # As servers do: a connection in TIME_WAIT is no obstacle, a listener is.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            return False
    # macOS lets a second program bind one address beside a listener on all of them: ask whether somebody answers.
    loopback = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((loopback if address in ("0.0.0.0", "::") else address, port)) != 0


def _bindable(host: str) -> str:
    """An address of this machine: a literal as it is, a name as all addresses."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "0.0.0.0"
    return host
