"""Statuses and views for tests of the control plane."""

from __future__ import annotations

from typing import Any

from mlx_cluster.cluster.membership import ClusterView, Member, NodeView
from mlx_cluster.cluster.status import ModelFacts, NodeStatus
from mlx_cluster.plan import ModelRef, Plan, StageAssignment, ranges_from_counts

VERSION = "mlx-cluster 0.1.0"
GIB = 1024**3


def facts(model_id: str = "tiny", layers: int = 6, manifest_hash: str = "m1") -> ModelFacts:
    return ModelFacts(model_id, manifest_hash, (1000,) * layers, embed_bytes=10, head_bytes=10, max_context=512)


def status(node_id: int, sequence: int = 1, boot: str = "boot", **changes: Any) -> NodeStatus:
    values: dict[str, Any] = {
        "node_id": node_id,
        "name": f"mini{node_id}",
        "pid": 100 + node_id,
        "host": f"10.0.0.{node_id}",
        "machine": f"machine{node_id}",
        "boot_id": boot,
        "sequence": sequence,
        "version": VERSION,
        "gateway_url": f"http://10.0.0.{node_id}:8000",
        "admin_url": f"http://10.0.0.{node_id}:8104",
        "comms_address": f"10.0.0.{node_id}:8101",
        "memory_total_bytes": 8 * GIB,
        "memory_free_bytes": 4 * GIB,
        "cores": 8,
        "models": (facts(),),
    }
    return NodeStatus(**{**values, **changes})


def members(count: int) -> list[Member]:
    return [Member(i, f"mini{i}", f"10.0.0.{i}") for i in range(count)]


def view(self_id: int, statuses: dict[int, NodeStatus | None], dead: frozenset[int] = frozenset()) -> ClusterView:
    """A table where ``None`` is a node that was never heard, and ``dead`` ones were heard once."""
    return ClusterView(
        self_id,
        tuple(
            NodeView(Member(i, f"mini{i}", f"10.0.0.{i}"), "dead" if i in dead or value is None else "alive", value, "")
            for i, value in sorted(statuses.items())
        ),
    )


def plan(
    counts: dict[int, int], version: int = 1, pipeline: str = "tiny", manifest_hash: str = "m1", transport: str = "grpc"
) -> Plan:
    """``{0: 2, 1: 4}``: two layers on node 0, then four on node 1."""
    layers = sum(counts.values())
    ranges = ranges_from_counts(list(counts.values()), layers)
    return Plan(
        pipeline,
        version,
        ModelRef(pipeline, manifest_hash, layers),
        tuple(StageAssignment(i, node, *ranges[i]) for i, node in enumerate(counts)),
        transport,
    )
