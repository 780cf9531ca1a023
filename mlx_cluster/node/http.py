"""The node's own HTTP applications: admin, node API and health.

Owns: their routes and statuses. Does not own: what they say (``report``), what an operator may do (``operator``),
serving (``gateway.server``).
Invariant: only POST and DELETE of the admin application change anything, and no web page can send them; /readyz
answers 200 only while a model can be served; every answer but /metrics and probes is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.errors import ClusterError, ConfigError
from mlx_cluster.metrics import CONTENT_TYPE, EngineStatistics, Metrics
from mlx_cluster.node import report
from mlx_cluster.node.operator import FORWARDED, Operator, status_of
from mlx_cluster.node.routes import NodeRoutes, Picture

MAX_COMMAND_BYTES = 64 * 1024

Act = Callable[[Request, dict[str, Any]], Awaitable[dict[str, Any]]]


def admin_app(
    cluster: str,
    settings: BaseModel,
    picture: Callable[[], Picture],
    routes: NodeRoutes,
    office: Callable[[], dict[str, Any]] = dict,
    commands: Sequence[Route] = (),
) -> Starlette:
    """The whole cluster. Every node has the whole view from heartbeats, so any node answers alike.

    ``office`` says who leads and why, as this node sees it; ``commands`` are the operator's routes.
    """

    async def show_cluster(_: Request) -> Response:
        return JSONResponse({**report.cluster(cluster, *picture()), **office()})

    async def show_coordinator(_: Request) -> Response:
        view, leadership, document = picture()
        return JSONResponse({**report.coordinator(view, leadership, document), **office()})

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
            Route("/coordinator", show_coordinator, methods=["GET"]),
            *commands,
            Route("/nodes", show_nodes),
            Route("/plan", show_plan),
            Route("/models", show_models),
            Route("/config", show_config),
        ]
    )


def operator_routes(operator: Operator) -> list[Route]:
    """What changes the cluster. Any node takes it and hands it to the coordinator."""

    def command(
        path: str,
        method: str,
        act: Callable[[Request, dict[str, Any]], Awaitable[dict[str, Any]]],
        *,
        here: bool = False,
    ) -> Route:
        async def answer(request: Request) -> Response:
            try:
                body = await _command_body(request)
                url = None if here or FORWARDED in request.headers else operator.leader_url()
                if url is not None:
                    status, data = await operator.forward(url, method, request.url.path, body)
                    return JSONResponse(data, status)
                return JSONResponse(await act(request, body))
            except ClusterError as error:
                return JSONResponse({"error": {"code": error.code, "message": str(error)}}, status_of(error))

        return Route(path, answer, methods=[method])

    async def pin(_: Request, body: dict[str, Any]) -> dict[str, Any]:
        node, ttl = body.get("node"), body.get("ttl_seconds")
        if not isinstance(node, str | int) or not isinstance(ttl, int | float | None):
            raise ConfigError('say {"node": "mini2"} and, if it shall end, "ttl_seconds": 600')
        return await operator.pin(str(node), ttl)

    async def unpin(_: Request, _body: dict[str, Any]) -> dict[str, Any]:
        return await operator.unpin()

    async def drain(request: Request, _body: dict[str, Any]) -> dict[str, Any]:
        return await operator.drain(request.path_params["node"])

    async def undrain(request: Request, _body: dict[str, Any]) -> dict[str, Any]:
        return await operator.drain(request.path_params["node"], undo=True)

    async def remove(request: Request, _body: dict[str, Any]) -> dict[str, Any]:
        return await operator.remove(request.path_params["node"])

    async def force(_: Request, _body: dict[str, Any]) -> dict[str, Any]:
        return await operator.force_new_cluster()

    return [
        command("/coordinator", "POST", pin),
        command("/coordinator", "DELETE", unpin),
        command("/coordinator/force-new-cluster", "POST", force, here=True),
        command("/nodes/{node}/drain", "POST", drain),
        command("/nodes/{node}/undrain", "POST", undrain),
        command("/nodes/{node}/remove", "POST", remove),
    ]


async def _command_body(request: Request) -> dict[str, Any]:
    """The JSON object of a command, {} for none. Raises ``ConfigError`` for a web page's request and for other bodies.

    A page of any site may post to a port of this machine; its browser then names the page's origin.
    """
    if "origin" in request.headers:
        raise ConfigError("commands are not taken from web pages: use mlx-cluster or a client without an Origin header")
    raw = await request.body()
    if len(raw) > MAX_COMMAND_BYTES:
        raise ConfigError(f"the body has {len(raw)} bytes, a command has at most {MAX_COMMAND_BYTES}")
    try:
        body = json.loads(raw) if raw else {}
    except ValueError as error:
        raise ConfigError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError("the body must be a JSON object")
    return body


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
