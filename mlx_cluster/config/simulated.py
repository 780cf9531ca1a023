"""A cluster of local processes: the settings that ``mlx-cluster up`` starts from.

Owns: names, addresses and ports of simulated nodes, and the demo model's split. Does not own: starting them (``cli``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cluster.config.names import node_name
from mlx_cluster.config.ports import FIRST_BASE_PORT, RESERVED, base_port
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError

HOST = "127.0.0.1"
FIRST_GATEWAY_PORT = 8000
NAMES = ("mini1", "mini2", "master")
MAX_NODES = 64
WITNESS_OFFSET = 9  # from the first node's base: behind that node's own ports
# The demo has the layers of Qwen2.5-7B and is cut like it on three nodes, so that a first run looks like the real
# cluster. Automatic placement would weigh its head as well.
DEMO_SPLIT_BY_NODES = {3: "10/9/9"}
DEMO_LAYERS = 28


def simulated_names(num_nodes: int) -> tuple[str, ...]:
    """``mini1, mini2, master, node4, node5 …``."""
    return tuple(NAMES[i] if i < len(NAMES) else f"node{i + 1}" for i in range(num_nodes))


def simulated_tree(
    num_nodes: int = 3,
    base: int = FIRST_BASE_PORT,
    gateway_port: int = FIRST_GATEWAY_PORT,
    models: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The sections, as plain values that can stand in a cluster.yaml. Raises ``ConfigError`` on a bad count."""
    if not 1 <= num_nodes <= MAX_NODES:
        raise ConfigError(f"--nodes {num_nodes}: choose 1 to {MAX_NODES}", key="cluster.nodes")
    # A second cluster beside a first one needs a coordinator's port of its own.
    coordinator = RESERVED.start if base == FIRST_BASE_PORT else base + 3 * 100
    nodes = []
    for node_id, name in enumerate(simulated_names(num_nodes)):
        own = base_port(node_id, base, coordinator)
        nodes.append({"host": HOST, "name": name, "node_id": node_id, "ports": [own + i for i in range(5)]})
    return {
        "cluster": {"name": "simulated", "nodes": nodes},
        "coordinator": {"port": coordinator},
        "api_gateway": {"host": HOST, "port": gateway_port},
        "models": {name: dict(entry) for name, entry in (models or {}).items()},
    }


def simulated_settings(
    num_nodes: int = 3, base: int = FIRST_BASE_PORT, gateway_port: int = FIRST_GATEWAY_PORT
) -> Settings:
    """The settings of ``simulated_tree``."""
    return Settings.model_validate(simulated_tree(num_nodes, base, gateway_port))


def demo_entry(num_nodes: int, path: str) -> dict[str, Any]:
    """The built-in demo's entry in ``models``."""
    entry: dict[str, Any] = {"path": path, "total_layers": DEMO_LAYERS}
    if split := DEMO_SPLIT_BY_NODES.get(num_nodes):
        entry["split"] = split
    return entry


def on_this_machine(settings: Settings, base: int | None = None) -> dict[str, Any]:
    """Manual keys that bring every node of a real cluster's settings to this machine, names kept.

    Ports are kept too, unless ``base`` asks for new ones. A witness comes along.
    """
    nodes = []
    for place, entry in enumerate(settings.cluster.nodes):
        node = entry.model_dump(mode="json", exclude_defaults=True) | {"host": HOST, "name": node_name(entry)}
        if base is not None:
            own = base_port(place, base, settings.coordinator.port)
            node["ports"] = [own + offset for offset in range(5)]
        nodes.append(node)
    keys: dict[str, Any] = {"cluster.nodes": nodes, "api_gateway.host": HOST}
    if (witness := settings.cluster.witness) is not None:
        port = witness.port if base is None else base + WITNESS_OFFSET
        keys["cluster.witness"] = {"host": HOST, "port": port}
    return keys
