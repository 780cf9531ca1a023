"""What the admin API says of a cluster, read and put into words.

Owns: asking any node's admin port, and the texts of ``up`` and ``status``. Does not own: printing.
Invariant: a field that an answer lacks is shown as unknown, never as an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class StageView:
    node: str
    start: int
    end: int
    pid: int | None = None
    memory_bytes: int | None = None
    sent_bytes_per_second: float | None = None  # to the next stage

    def __str__(self) -> str:
        return f"{self.node}[{self.start}-{self.end})"


@dataclass(frozen=True, slots=True)
class PipelineView:
    model: str
    state: str
    detail: str = ""
    transport: str = ""
    transport_reason: str = ""
    epoch: str = ""
    progress: float | None = None  # 0…1
    stages: tuple[StageView, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeView:
    node_id: int
    name: str
    state: str
    host: str = ""
    gateway_url: str = ""
    pid: int | None = None
    drained: bool = False
    detail: str = ""
    round_trips: tuple[tuple[int, float], ...] = ()  # (node id, seconds)


@dataclass(frozen=True, slots=True)
class ClusterView:
    cluster: str
    coordinator: str
    nodes: tuple[NodeView, ...]
    pipelines: tuple[PipelineView, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClusterView:
        """From the answer of GET /cluster."""
        nodes = tuple(
            NodeView(
                node_id=node["node_id"],
                name=node.get("name") or f"node_{node['node_id']}",
                state=node.get("state") or "unknown",
                host=node.get("host") or "",
                gateway_url=node.get("gateway_url") or "",
                pid=node.get("pid"),
                drained=bool(node.get("drained")),
                detail=node.get("detail") or "",
                round_trips=tuple((trip["node_id"], trip["seconds"]) for trip in node.get("round_trips") or ()),
            )
            for node in data.get("nodes", ())
        )
        names = {node.node_id: node.name for node in nodes}
        coordinator: int | None = (data.get("coordinator") or {}).get("node_id")
        return cls(
            cluster=data.get("cluster") or "",
            coordinator="none" if coordinator is None else names.get(coordinator, f"node_{coordinator}"),
            nodes=nodes,
            pipelines=(
                *(_pipeline(p, names) for p in data.get("pipelines", ())),
                *(PipelineView(model, "failed", why) for model, why in (data.get("unplaced") or {}).items()),
            ),
        )


def _pipeline(data: dict[str, Any], names: dict[int, str]) -> PipelineView:
    return PipelineView(
        model=data["model"],
        state=data.get("state") or "unknown",
        detail=data.get("detail") or "",
        transport=data.get("transport") or "",
        transport_reason=data.get("transport_reason") or "",
        epoch=str(data.get("epoch") or ""),
        progress=_fraction(data.get("progress")),
        stages=tuple(
            StageView(
                names.get(s["node_id"], f"node_{s['node_id']}"),
                s["start"],
                s["end"],
                s.get("pid"),
                s.get("memory_bytes"),
                s.get("sent_bytes_per_second"),
            )
            for s in data.get("stages", ())
        ),
    )


def _fraction(progress: Any) -> float | None:
    match progress:
        case {"done_bytes": int(done), "total_bytes": int(total)} if total > 0:
            return done / total
        case float() | int():
            return float(progress)
        case _:
            return None


async def ask_cluster(client: httpx.AsyncClient, urls: Iterable[str]) -> ClusterView | None:
    """The first answer of these admin addresses; None when nobody answers yet."""
    for url in urls:
        data = await ask_json(client, f"{url}/cluster")
        if data is not None:
            return ClusterView.from_json(data)
    return None


async def ask_json(client: httpx.AsyncClient, url: str) -> dict[str, Any] | None:
    """One GET; None when nobody listens there, or no JSON object comes back."""
    import httpx

    try:
        answer = await client.get(url)
        data = answer.json() if answer.is_success else None
    except (httpx.TransportError, ValueError):
        return None
    return data if isinstance(data, dict) else None


# -- words ------------------------------------------------------------------------------------------


def ready_line(gateway_url: str, pipelines: Sequence[PipelineView]) -> str:
    """The one line that says that a cluster serves; scripts wait for its first word."""
    parts = [f"ready {gateway_url}"]
    for pipeline in pipelines:
        parts.append(f"model {pipeline.model}")
        parts.append(" ".join(map(str, pipeline.stages)))
        reason = f" ({pipeline.transport_reason})" if pipeline.transport_reason else ""
        parts.append(f"transport {pipeline.transport or 'none'}{reason}")
    return "  ".join(part.replace("\n", " ") for part in parts if part)


def progress_text(view: ClusterView | None, models: Sequence[str]) -> str:
    """Where the bring-up stands, in one line."""
    if view is None:
        return "starting the nodes"
    alive = [node.name for node in view.nodes if node.state == "alive"]
    texts = [f"{len(alive)} of {len(view.nodes)} nodes are up"]
    known = {pipeline.model: pipeline for pipeline in view.pipelines}
    for model in models:
        pipeline = known.get(model)
        if pipeline is None:
            texts.append(f"{model}: waiting for a plan")
            continue
        percent = "" if pipeline.progress is None or pipeline.state == "ready" else f" {int(pipeline.progress * 10)}0 %"
        where = f" on {' '.join(map(str, pipeline.stages))}" if pipeline.stages else ""
        detail = f": {pipeline.detail}" if pipeline.detail else ""
        texts.append(f"{model}: {pipeline.state}{percent}{where}{detail}")
    return "; ".join(texts)
