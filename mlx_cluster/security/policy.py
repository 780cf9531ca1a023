"""What may listen where.

Owns: the rule that nothing is reachable from other machines without authentication and TLS, unless an operator said so
in words (``network.insecure``), and the address that follows for each listener.
Invariant: an address that these functions return may be bound.
"""

from __future__ import annotations

from mlx_cluster.config.names import is_loopback, node_name, settings_of_node
from mlx_cluster.config.schema import NodeEntry, Settings
from mlx_cluster.errors import ConfigError

LOOPBACK = "127.0.0.1"


def gateway_host(settings: Settings) -> str:
    """The address of the OpenAI-compatible gateway. Raises ``ConfigError`` when it must not be bound."""
    check_bind(settings, settings.api_gateway.host, "api_gateway.host")
    return settings.api_gateway.host


def node_host(settings: Settings, entry: NodeEntry) -> str:
    """The address of a node's internal ports. Raises ``ConfigError`` when it must not be bound.

    ``nodes.<name>.bind`` if set; loopback while every node is on loopback; else the node's own address, or all
    addresses where ``cluster.nodes`` gives a name or ``nodes.<name>.addresses`` further addresses.
    """
    bind = settings_of_node(settings, entry).bind
    others = set(settings_of_node(settings, entry).addresses) - {entry.host}
    if bind is not None:
        check_bind(settings, bind, f"nodes.{node_name(entry)}.bind")
        return bind
    if others:
        check_bind(settings, "0.0.0.0", f"nodes.{node_name(entry)}.addresses")
        return "0.0.0.0"
    if all(is_loopback(node.host) for node in settings.cluster.nodes):
        return LOOPBACK if entry.host == "localhost" else entry.host
    host = entry.host if _is_literal(entry.host) else "0.0.0.0"
    check_bind(settings, host, "cluster.nodes")
    return host


def check_all(settings: Settings) -> None:
    """Raise ``ConfigError`` for the first listener of this cluster that must not be bound."""
    gateway_host(settings)
    for entry in settings.cluster.nodes:
        node_host(settings, entry)


def check_bind(settings: Settings, host: str, key: str) -> None:
    """Raise ``ConfigError`` unless ``host`` is loopback or ``network.insecure`` is set.

    This version has neither authentication nor TLS, so there is no third way yet.
    """
    if is_loopback(host) or settings.network.insecure:
        return
    raise ConfigError(
        f"{key}: {host} is reachable from other machines, and this cluster has no authentication and no TLS. "
        "Keep it on 127.0.0.1, or, on a network where every machine is trusted, set network.insecure: true "
        "(command line: --insecure)",
        key=key,
    )


def _is_literal(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()
