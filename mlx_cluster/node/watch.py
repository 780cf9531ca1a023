"""Which nodes came, fell silent, died or left: the table of nodes turned into news.

Owns: the comparison with the last look. Does not own: the table (``cluster.membership``).
"""

from __future__ import annotations

from collections.abc import Mapping

from mlx_cluster.cluster.membership import ClusterView, NodeState
from mlx_cluster.metrics import ClusterMetrics
from mlx_cluster.node.history import History, Kind

_KINDS: Mapping[NodeState, Kind] = {"alive": "node_alive", "suspect": "node_suspect", "dead": "node_dead"}


class NodeWatch:
    def __init__(self, history: History, metrics: ClusterMetrics) -> None:
        self._history, self._metrics = history, metrics
        self._known: dict[int, tuple[NodeState, str | None]] = {}

    def look(self, view: ClusterView) -> bool:
        """Note every change since the last look; True when a node died, came, or came back as another boot."""
        known = {
            n.node_id: (n.state, n.status.boot_id if n.status is not None and n.state != "dead" else None)
            for n in view.nodes
        }
        if known == self._known:
            return False
        changed = False
        for node in view.nodes:
            state, boot = known[node.node_id]
            before = self._known.get(node.node_id, ("dead", None))
            changed = changed or boot != before[1]
            if (state, boot) != before:
                left = node.status is not None and node.status.leaving
                self._history.note(
                    "node_left" if left else _KINDS[state], node=node.member.name, boot=boot, detail=node.detail
                )
        for state in _KINDS:
            self._metrics.nodes.labels(state).set(sum(s == state for s, _ in known.values()))
        self._known = known
        return changed
