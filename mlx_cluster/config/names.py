"""How people call nodes, and how a model's layers are said by hand.

Owns: the names of nodes (``mini1``, ``node_0``, ``0``, ``mini1.local``) and the way from ``sharding`` or ``split`` to
layer ranges. Does not own: where these words stand in a file (``config.check`` adds that to an error).
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_cluster.config.quantity import parse_bytes
from mlx_cluster.config.schema import ModelEntry, NodeEntry, NodeSettings, Settings
from mlx_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ManualStage:
    """Layers ``[start, end)`` that a person gave to a node. ``estimated_bytes`` is that person's guess."""

    node_id: int
    start: int
    end: int
    estimated_bytes: int | None = None


def node_name(entry: NodeEntry) -> str:
    """The name, else the first label of the host (``mini1.local`` → ``mini1``), else ``node_<id>``."""
    if entry.name:
        return entry.name
    label = entry.host.partition(".")[0]
    return f"node_{entry.node_id}" if _is_address(entry.host) or label == "localhost" or not label else label


def find_node(settings: Settings, ref: str | int) -> NodeEntry:
    """The node that ``ref`` means: its name, ``node_<id>``, its id or its host. Raises ``ConfigError``."""
    text = str(ref)
    for entry in settings.cluster.nodes:
        if text in (node_name(entry), f"node_{entry.node_id}", str(entry.node_id)):
            return entry
    by_host = [entry for entry in settings.cluster.nodes if entry.host == text]
    if len(by_host) == 1:
        return by_host[0]
    names = [node_name(entry) for entry in settings.cluster.nodes]
    raise ConfigError(
        f"no node is called {text!r}{did_you_mean(text, names)}; cluster.nodes has {', '.join(names) or 'no nodes'}",
        key="cluster.nodes",
    )


def settings_of_node(settings: Settings, entry: NodeEntry) -> NodeSettings:
    """What nodes.yaml says of this node, under any of its names; defaults when it says nothing."""
    for ref, node_settings in settings.nodes.items():
        if find_node(settings, ref).node_id == entry.node_id:
            return node_settings
    return NodeSettings()


def manual_stages(settings: Settings, model: ModelEntry) -> tuple[ManualStage, ...]:
    """The stages that ``sharding`` or ``split`` ask for, in layer order; empty when placement is automatic.

    A split goes over the nodes in order of their ids; a 0 in it leaves a node out.
    """
    if model.sharding:
        return tuple(
            sorted(
                (
                    ManualStage(
                        find_node(settings, ref).node_id,
                        shard.layers[0],
                        shard.layers[1] + 1,
                        parse_bytes(shard.estimated_memory) if shard.estimated_memory else None,
                    )
                    for ref, shard in model.sharding.items()
                ),
                key=lambda stage: stage.start,
            )
        )
    if model.split is None:
        return ()
    node_ids = sorted(entry.node_id for entry in settings.cluster.nodes)
    return split_stages([int(count) for count in model.split.split("/")], node_ids)


def split_stages(counts: Sequence[int], node_ids: Sequence[int]) -> tuple[ManualStage, ...]:
    """``[10, 9, 9]`` over nodes 0, 1, 2 → three stages. Raises ``ConfigError`` on more counts than nodes."""
    if len(counts) > len(node_ids):
        written = "/".join(map(str, counts))
        raise ConfigError(
            f"the split {written} names {len(counts)} nodes, the cluster has {len(node_ids)}: "
            f"give {len(node_ids)} numbers or add nodes"
        )
    stages: list[ManualStage] = []
    start = 0
    for node_id, count in zip(node_ids, counts, strict=False):
        if count:
            stages.append(ManualStage(node_id, start, start + count))
            start += count
    return tuple(stages)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'transport'?)"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own by definition; a name that must be looked up is not."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
