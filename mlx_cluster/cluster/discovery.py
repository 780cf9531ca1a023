"""What other machines say of their addresses on the local network, as far as it can be used.

Owns: the form of an announcement, which of them count, and the further addresses of each configured node. Pure.
Does not own: the network (``node.discovery``), which address is dialled (``addresses``).
Invariant: everything heard is untrusted, so it only ever adds addresses, of nodes that the configuration names, at the
ports that it gives them, and a bounded number of these.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

SERVICE_TYPE = "_mlx-cluster._tcp.local."
# A host on the network may say as much as it likes; so much of it is remembered.
MAX_SERVICES = 256
MAX_ADDRESSES = 8  # of each node
MAX_TEXT_BYTES = 255  # what one TXT entry can hold


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says of itself. ``port`` is its comms port, ``addresses`` are IP literals."""

    cluster: str
    node_id: int
    name: str
    version: str
    port: int
    addresses: tuple[str, ...]

    def properties(self) -> dict[str, str]:
        """The TXT entries; the port and the addresses travel in records of their own."""
        return {
            "cluster": self.cluster,
            "node_id": str(self.node_id),
            "name": self.name,
            "version": self.version,
        }


def read(properties: Mapping[bytes, bytes | None], port: int | None, addresses: Iterable[str]) -> Announcement | None:
    """An announcement, or None for what is none."""
    texts: dict[str, str] = {}
    for key in (b"cluster", b"node_id", b"name", b"version"):
        value = properties.get(key)
        if value is None or len(value) > MAX_TEXT_BYTES:
            return None
        try:
            texts[key.decode()] = value.decode()
        except UnicodeDecodeError:
            return None
        if not texts[key.decode()].isprintable():  # it will stand in a log
            return None
    node_id = texts["node_id"]
    if not (node_id.isascii() and node_id.isdecimal() and len(node_id) <= 3) or port is None:
        return None
    return Announcement(
        cluster=texts["cluster"],
        node_id=int(node_id),
        name=texts["name"],
        version=texts["version"],
        port=port,
        addresses=tuple(addresses)[:MAX_ADDRESSES],
    )


@dataclass(frozen=True, slots=True)
class Known:
    """A configured node: its name, its comms port and the comms addresses that need no discovery."""

    name: str
    port: int
    addresses: Collection[str]


class Hints:
    """Further addresses of the configured nodes. ``nodes`` are the others, without this one.

    One thread may write while others read: what is read is replaced whole.
    """

    def __init__(self, cluster: str, nodes: Mapping[int, Known], *, loopback: bool = False) -> None:
        self._cluster, self._nodes, self._loopback = cluster, dict(nodes), loopback
        self._services: dict[str, Announcement] = {}
        self._found: dict[int, tuple[str, ...]] = {}

    def of(self, node_id: int) -> tuple[str, ...]:
        """Comms addresses as ``host:port``, those heard first in front."""
        return self._found.get(node_id, ())

    def heard(self, service: str, announcement: Announcement) -> str:
        """Take what a service says now; why it is ignored, or ""."""
        reason = self._refusal(announcement)
        if not reason and service not in self._services and len(self._services) >= MAX_SERVICES:
            reason = f"{MAX_SERVICES} services are remembered already"
        if reason:
            self.gone(service)
            return reason
        self.gone(service)
        self._services[service] = announcement
        self._merge(announcement.node_id)
        return ""

    def gone(self, service: str) -> None:
        before = self._services.pop(service, None)
        if before is not None:
            self._merge(before.node_id)

    def _refusal(self, announcement: Announcement) -> str:
        if announcement.cluster != self._cluster:
            return "it belongs to another cluster"
        node = self._nodes.get(announcement.node_id)
        if node is None:
            return "it is this node itself, or none that cluster.nodes names"
        if (announcement.name, announcement.port) != (node.name, node.port):
            return f"cluster.nodes has node {announcement.node_id} as {node.name} with comms port {node.port}"
        return ""

    def _merge(self, node_id: int) -> None:
        node = self._nodes[node_id]
        said = [a for each in self._services.values() if each.node_id == node_id for a in each.addresses]
        hosts = [host for each in said if (host := usable(each, loopback=self._loopback)) is not None]
        dialled = dict.fromkeys(f"{host}:{node.port}" for host in hosts)
        further = tuple(address for address in dialled if address not in node.addresses)
        self._found = {**self._found, node_id: further[:MAX_ADDRESSES]}


def usable(address: str, *, loopback: bool) -> str | None:
    """The address as a host to dial (IPv6 in brackets), or None for one that cannot be another machine's.

    169.254.0.0/16 counts: a Thunderbolt bridge has such addresses. Its IPv6 sister does not, for it needs a zone.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    if found.is_multicast or found.is_unspecified or (found.is_loopback and not loopback):
        return None
    if found.version == 4:
        return None if found.packed[0] >= 240 else str(found)
    return None if found.is_link_local or found.ipv4_mapped is not None else f"[{found}]"
