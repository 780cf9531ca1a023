"""The node's own HTTP applications: admin, node API and health. All of them only read.

Owns: their routes and statuses. Does not own: what they say (``report``), serving (``gateway.server``).
Invariant: /readyz answers 200 only while a model can be served; every answer but /metrics and probes is JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.metrics import CONTENT_TYPE, EngineStatistics, Metrics
from mlx_cluster.node import report
from mlx_cluster.node.routes import NodeRoutes, Picture

Answer = Callable[[Request], Awaitable[Response]]


def admin_app(cluster: str, settings: BaseModel, picture: Callable[[], Picture], routes: NodeRoutes) -> Starlette:
    """The whole cluster. Every node has the whole view from heartbeats, so any node answers alike."""

    async def show_cluster(_: Request) -> Response:
        return JSONResponse(report.cluster(cluster, *picture()))

    async def show_nodes(_: Request) -> Response:
        return JSONResponse(report.nodes(picture()[0]))

    async def show_plan(_: Request) -> Response:
        return JSONResponse(report.plan(picture()[2]))

    async def show_models(_: Request) -> Response:
        return JSONResponse({"models": [_model(model) for model in routes.models()]})

    async def show_config(_: Request) -> Response:
        return JSONResponse(report.config(settings))

    return Starlette(
        routes=[
            Route("/cluster", show_cluster),
            Route("/nodes", show_nodes),
            Route("/plan", show_plan),
            Route("/models", show_models),
            Route("/config", show_config),
        ]
    )


def node_app(status: Callable[[], NodeStatus], engines: EngineStatistics) -> Starlette:
    """This node alone; ``engines`` are those whose stage 0 it holds."""

    async def show_node(_: Request) -> Response:
        now = status()
        return JSONResponse(
            {
                "node_id": now.node_id,
                "name": now.name,
                "pid": now.pid,
                "version": now.version,
                "memory": report.memory(now),
                "cores": now.cores,
                "models": [facts.id for facts in now.models],
                "missing_models": dict(now.missing),
            }
        )

    async def show_stages(_: Request) -> Response:
        return JSONResponse({"stages": [report.stage(each) for each in status().stages]})

    async def show_engines(_: Request) -> Response:
        named = [{"model": model, "pipeline": name, **figures} for (model, name), figures in engines().items()]
        return JSONResponse({"engines": named})

    async def show_memory(_: Request) -> Response:
        return JSONResponse(report.memory(status()))

    return Starlette(
        routes=[
            Route("/", show_node),
            Route("/node", show_node),
            Route("/stages", show_stages),
            Route("/memory", show_memory),
            Route("/engines", show_engines),
        ]
    )


def health_app(status: Callable[[], NodeStatus], routes: NodeRoutes, metrics: Metrics) -> Starlette:
    """Probes. A node without any ready model is alive, but not ready."""

    def models() -> dict[str, Any]:
        return {model.id: _model(model) for model in routes.models()}

    def ready() -> bool:
        return any(model.state == "ready" for model in routes.models())

    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        if ready():
            return PlainTextResponse("ok\n")
        why = "; ".join(f"{m.id} is {m.state} ({m.detail})" for m in routes.models()) or "no model is configured"
        return PlainTextResponse(f"not ready: {why}\n", 503)

    async def health(_: Request) -> Response:
        now = status()
        return JSONResponse(
            {
                "status": "ok" if ready() else "unavailable",
                "node": {"id": now.node_id, "name": now.name},
                "version": now.version,
                "models": models(),
                "stages": [report.stage(each) for each in now.stages],
            },
            200 if ready() else 503,
        )

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/health", health),
            Route("/metrics", show_metrics),
        ]
    )


def _model(model: Any) -> dict[str, Any]:
    return {
        "id": model.id,
        "aliases": list(model.aliases),
        "state": model.state,
        "detail": model.detail,
        "max_context": model.max_context,
    }
