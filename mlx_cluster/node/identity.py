"""Who this node is: its entry, names, addresses and folders, resolved once at start.

Owns: ``Identity``. Does not own: the settings, the plan of ports, the rule what may be bound where.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from mlx_cluster.cluster.membership import Member
from mlx_cluster.config.names import find_node, is_loopback, node_name, settings_of_node
from mlx_cluster.config.ports import NodePorts, plan_ports
from mlx_cluster.config.schema import NodeEntry, Settings
from mlx_cluster.errors import ConfigError
from mlx_cluster.security import policy


@dataclass(frozen=True, slots=True)
class Identity:
    """``host`` is where others dial, ``bind_host`` what the internal ports listen on."""

    entry: NodeEntry
    name: str
    host: str
    bind_host: str
    gateway_host: str
    ports: NodePorts
    state_dir: Path
    peers: dict[int, str]  # comms addresses of the other nodes
    members: tuple[Member, ...]
    other_addresses: dict[int, tuple[str, ...]] = field(default_factory=dict)  # further comms addresses of the peers

    @property
    def node_id(self) -> int:
        return self.entry.node_id

    @property
    def comms_address(self) -> str:
        return f"{self.host}:{self.ports.comms}"

    @property
    def gateway_url(self) -> str:
        host = self.gateway_host if is_loopback(self.gateway_host) else self.host
        return f"http://{host}:{self.ports.gateway}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.host}:{self.ports.admin}"


def identify(settings: Settings, ref: str) -> Identity:
    """The node that ``ref`` means (a name, an id, a host). Raises ``ConfigError``."""
    if not settings.cluster.nodes:
        raise ConfigError("cluster.nodes is empty: name at least one node", key="cluster.nodes")
    entry = find_node(settings, ref)
    ports = plan_ports(settings)
    name = node_name(entry)
    return Identity(
        entry=entry,
        name=name,
        host=entry.host,
        bind_host=policy.node_host(settings, entry),
        gateway_host=policy.gateway_host(settings),
        ports=ports[entry.node_id],
        state_dir=_state_dir(settings, entry, name),
        peers={
            other.node_id: f"{other.host}:{ports[other.node_id].comms}"
            for other in settings.cluster.nodes
            if other.node_id != entry.node_id
        },
        members=tuple(Member(each.node_id, node_name(each), each.host) for each in settings.cluster.nodes),
        other_addresses={
            other.node_id: tuple(
                f"[{host}]:{ports[other.node_id].comms}" if ":" in host else f"{host}:{ports[other.node_id].comms}"
                for host in settings_of_node(settings, other).addresses
            )
            for other in settings.cluster.nodes
            if other.node_id != entry.node_id
        },
    )


def _state_dir(settings: Settings, entry: NodeEntry, name: str) -> Path:
    given = settings_of_node(settings, entry).state_dir
    if given is not None:
        return Path(given).expanduser()
    return default_state_dir(settings, name)


def default_state_dir(settings: Settings, name: str) -> Path:
    """Where ``name`` remembers when the configuration does not say where."""
    home = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
    return home / "mlx-cluster" / settings.cluster.name / name


def ipv4_of(host: str) -> str:
    """The address that mlx's ring can use: it knows IPv4 literals only. Raises ``ConfigError``."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(
            f"{host} has no IPv4 address ({error}): write the address in cluster.nodes[].host", key="cluster.nodes"
        ) from error
