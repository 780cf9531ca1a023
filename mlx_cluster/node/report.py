"""What the HTTP ports say of the cluster: from the table of nodes to plain JSON values.

Owns: the shape of ``GET /cluster`` and its relatives. Pure.
Does not own: HTTP (``http``). Invariant: layer bounds are half-open everywhere: ``end`` is not held.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import ClusterView, NodeView
from mlx_cluster.cluster.status import NodeStatus, PipelineStatus, StageStatus
from mlx_cluster.plan import Epoch, Plan

Json = dict[str, Any]
MAX_RECOVERIES = 20


def cluster(name: str, view: ClusterView, leadership: Leadership, document: ClusterDocument) -> Json:
    """The whole picture, as any node sees it."""
    return {
        "cluster": name,
        "coordinator": {"node_id": leadership.node_id, "term": leadership.term},
        "document": _document(document),
        "nodes": [{**_node(node), "drained": node.node_id in document.drained} for node in view.nodes],
        "pipelines": [
            *pipelines(view, document),
            *(_unplaced(model, why) for model, why in unplaced(view, leadership).items()),
        ],
        "recoveries": recoveries(view),
    }


def coordinator(view: ClusterView, leadership: Leadership, document: ClusterDocument) -> Json:
    """Who leads, since which term, and whom the operator wants."""
    leader = leadership.node_id
    return {
        "coordinator": {
            "node_id": leader,
            "name": view.name_of(leader) if leader is not None else None,
            "term": leadership.term,
        },
        "document": _document(document),
    }


def recoveries(view: ClusterView) -> list[Json]:
    """The last recoveries of all pipelines, newest first, as the nodes that drove them tell."""
    found = [
        {"node_id": node.node_id, **asdict(recovery)}
        for node in view.nodes
        if node.status is not None
        for recovery in node.status.recoveries
    ]
    return sorted(found, key=lambda recovery: -recovery["at"])[:MAX_RECOVERIES]


def _document(document: ClusterDocument) -> Json:
    return {
        "era": document.era,
        "term": document.term,
        "version": document.version,
        "pin": asdict(document.pin) if document.pin is not None else None,
        "drained": list(document.drained),
    }


def nodes(view: ClusterView) -> Json:
    """Every node with what it has: memory, cores, models, stages."""
    return {
        "nodes": [
            {
                **_node(node),
                "version": node.status.version if node.status else None,
                "boot_id": node.status.boot_id if node.status else None,
                "memory_total_bytes": node.status.memory_total_bytes if node.status else None,
                "memory_free_bytes": node.status.memory_free_bytes if node.status else None,
                "cores": node.status.cores if node.status else None,
                "speed_bytes_per_second": (node.status.speed_bytes_per_second or None) if node.status else None,
                "models": [facts.id for facts in node.status.models] if node.status else [],
                "missing_models": dict(node.status.missing) if node.status else {},
                "stages": [stage(s) for s in node.status.stages] if node.status else [],
            }
            for node in view.nodes
        ]
    }


def plan(document: ClusterDocument) -> Json:
    """The cluster document in force."""
    return {
        "term": document.term,
        "version": document.version,
        "plans": [each.to_json() for each in document.plans],
    }


def _node(node: NodeView) -> Json:
    status = node.status
    return {
        "node_id": node.node_id,
        "name": node.member.name,
        "state": node.state,
        "pid": status.pid if status else None,
        "host": node.member.host,
        "gateway_url": status.gateway_url if status else None,
        "admin_url": status.admin_url if status else None,
        "detail": node.detail,
        "health": status.health if status else None,
        "load": status.load if status else None,
        "round_trips": [
            {"node_id": node_id, "seconds": seconds} for node_id, seconds in (status.round_trips if status else ())
        ],
    }


def stage(value: StageStatus) -> Json:
    return {
        "pipeline": value.pipeline,
        "epoch": str(value.epoch),
        "index": value.index,
        "start": value.start,
        "end": value.end,
        "pid": value.pid or None,
        "state": value.state,
        "memory_bytes": value.memory_bytes,
        "progress": {"done_bytes": value.done_bytes, "total_bytes": value.total_bytes},
        "detail": value.detail,
        "compression": value.compression,
    }


# -- pipelines ---------------------------------------------------------------------------------------


def pipelines(view: ClusterView, document: ClusterDocument) -> list[Json]:
    """One entry per plan: as its driver tells it, or as the document promises it while no living node drives it."""
    return [_pipeline(view, each, driven(view, each)) for each in document.plans]


def driven(view: ClusterView, wanted: Plan) -> PipelineStatus | None:
    """What the agent that drives this very plan says of it; None when it says nothing or is dead."""
    node = view.node(wanted.engine_node_id)
    if node is None or node.status is None or node.state == "dead":
        return None
    return next(
        (p for p in node.status.pipelines if p.plan.pipeline == wanted.pipeline and p.plan.version == wanted.version),
        None,
    )


def _pipeline(view: ClusterView, wanted: Plan, status: PipelineStatus | None) -> Json:
    running = status.plan if status else wanted
    epoch = status.epoch if status else Epoch(wanted.version, 0)
    sent = status.sent_bytes_per_second if status else ()
    stages = [_stage_of(view, running, index, epoch) for index in range(running.num_stages)]
    detail = status.detail if status else f"waiting for {view.name_of(wanted.engine_node_id)} to take it up"
    return {
        "model": wanted.model.id,
        "epoch": str(epoch),
        "state": status.state if status else "loading",
        "transport": running.transport,
        "engine_node_id": running.engine_node_id,
        "stages": [
            {
                "node_id": running.stages[index].node_id,
                "start": running.stages[index].start,
                "end": running.stages[index].end,
                "pid": value.pid or None if value else None,
                "memory_bytes": value.memory_bytes if value else 0,
                "state": value.state if value else "absent",
                "detail": value.detail if value else "",
                "compression": value.compression if value else "off",
                "sent_bytes_per_second": sent[index] if index < len(sent) else None,
            }
            for index, value in enumerate(stages)
        ],
        "detail": detail,
        "transport_reason": running.transport_reason,
        "progress": progress(s for s in stages if s is not None),
    }


def _stage_of(view: ClusterView, running: Plan, index: int, epoch: Epoch) -> StageStatus | None:
    node = view.node(running.stages[index].node_id)
    if node is None or node.status is None or node.state == "dead":
        return None
    return next(
        (s for s in node.status.stages if (s.pipeline, s.index, s.epoch) == (running.pipeline, index, epoch)), None
    )


def _unplaced(model: str, why: str) -> Json:
    """A model without a plan, in the shape of a pipeline: it failed before it had an epoch or a stage."""
    return {
        "model": model,
        "epoch": "0.0",
        "state": "failed",
        "transport": "",
        "engine_node_id": None,
        "stages": [],
        "detail": why,
        "transport_reason": "",
        "progress": progress(()),
    }


def progress(stages: Iterable[StageStatus]) -> Json:
    stages = tuple(stages)
    return {
        "done_bytes": sum(s.done_bytes for s in stages),
        "total_bytes": sum(s.total_bytes for s in stages),
    }


def unplaced(view: ClusterView, leadership: Leadership) -> dict[str, str]:
    """Models without a plan and why, as the coordinator says."""
    leader = view.node(leadership.node_id) if leadership.node_id is not None else None
    return dict(leader.status.unplaced) if leader is not None and leader.status is not None else {}


# -- models and settings -------------------------------------------------------------------------------


def model_state(model_id: str, view: ClusterView, leadership: Leadership, document: ClusterDocument) -> tuple[str, str]:
    """(state, detail) of a configured model: ``ready`` (one replica is enough), ``loading`` or ``failed``."""
    told: dict[str, str] = {}
    for wanted in document.plans:
        if wanted.model.id == model_id:
            status = driven(view, wanted)
            waits = f"waiting for {view.name_of(wanted.engine_node_id)} to take it up"
            state, detail = (status.state, status.detail) if status is not None else ("loading", waits)
            told.setdefault(state, detail)
    for state in ("ready", "loading", "failed"):
        if state in told:
            return state, told[state]
    if why := unplaced(view, leadership).get(model_id):
        return "failed", why
    return "loading", "waiting for the coordinator to place it"


def memory(status: NodeStatus) -> Json:
    return {
        "total_bytes": status.memory_total_bytes,
        "free_bytes": status.memory_free_bytes,
        "stages_bytes": sum(s.memory_bytes for s in status.stages),
    }


def config(settings: BaseModel) -> Json:
    """The settings in force; pydantic masks what the schema calls secret."""
    return settings.model_dump(mode="json")
