"""The gateway's HTTP application.

Owns: the routes. Does not own: what happens on them (``schemas``, ``answer``), serving (``server``).
Invariant: every answer that is not a success is an OpenAI error object, also for unknown routes and wrong methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.errors import Unavailable
from mlx_cluster.gateway.answer import Gateway, GenerationResponse, MakeDialect
from mlx_cluster.gateway.ask import Ask
from mlx_cluster.gateway.catalogue import Catalogue
from mlx_cluster.gateway.client import read_json_body
from mlx_cluster.gateway.embeddings_routes import add_embeddings
from mlx_cluster.gateway.errors import MethodNotAllowed, RouteNotFound
from mlx_cluster.gateway.idempotency import drawn_id
from mlx_cluster.gateway.incoming import asked_by, has_effect, name_dropped
from mlx_cluster.gateway.messages_routes import add_messages
from mlx_cluster.gateway.middleware import Exchange
from mlx_cluster.gateway.models_routes import add_models
from mlx_cluster.gateway.ollama_routes import add_ollama
from mlx_cluster.gateway.openai import ChatDialect, CompletionDialect
from mlx_cluster.gateway.openapi import describe
from mlx_cluster.gateway.origin import OriginPolicy
from mlx_cluster.gateway.responses_routes import add_responses
from mlx_cluster.gateway.schemas import ChatBody, CompletionBody, parse_chat, parse_completion
from mlx_cluster.gateway.shelf import Elsewhere
from mlx_cluster.gateway.store import FILE_NAME, ResponseStore
from mlx_cluster.gateway.token_routes import add_tokens
from mlx_cluster.gateway.web_page import add_web_page
from mlx_cluster.metrics import CONTENT_TYPE, Metrics
from mlx_cluster.request import Routes, ServedModel

# A longer body is parsed in a thread: a megabyte of messages takes longer than other clients' tokens should wait.
PARSE_ON_LOOP_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Which node this gateway runs on."""

    node_id: int
    name: str
    cluster: str = ""
    version: str = ""


def create_app(
    routes: Routes,
    settings: ApiGatewaySection,
    node_info: NodeInfo,
    metrics: Metrics | None = None,
    state_dir: Path | None = None,
    elsewhere: Elsewhere | None = None,
) -> FastAPI:
    """The application of one gateway. ``app.state.gateway.catalogue.warm()`` loads tokenizers ahead of time.

    ``state_dir`` keeps stored responses; without it they end with the process. ``elsewhere`` are those of other nodes,
    and ``app.state.shelf`` this node's, for them.
    """
    metrics = metrics if metrics is not None else Metrics()
    gateway = Gateway(Catalogue(routes), settings, metrics.gateway)
    app = FastAPI(title="mlx-cluster", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    app.add_middleware(Exchange, metrics=metrics.gateway, policy=OriginPolicy.of(settings))
    app.add_exception_handler(HTTPException, _not_routed)
    _add_generation(app, gateway)
    add_messages(app, gateway)
    store = ResponseStore(state_dir and state_dir / FILE_NAME)
    app.state.shelf = add_responses(app, gateway, node_info.node_id, store, elsewhere)
    add_models(app, gateway)
    add_tokens(app, gateway)
    add_embeddings(app, gateway)
    add_ollama(app, gateway)
    _add_state(app, gateway, node_info, metrics)
    add_web_page(app, gateway)
    describe(app)
    return app


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    async def generate(
        request: Request, parse: Callable[[bytes], Ask], make_dialect: MakeDialect, prefix: str
    ) -> Response:
        settings = gateway.settings
        raw = await read_json_body(request, max_bytes=settings.max_body_bytes, timeout_seconds=settings.timeout)
        ask = parse(raw) if len(raw) <= PARSE_ON_LOOP_BYTES else await gateway.catalogue.off_loop(parse, raw)
        if ask.hints and not await has_effect(ask, gateway):
            name_dropped(request, ask.hints)
        # The engine's id is ours alone: a client's x-request-id need not be unique in the cluster.
        ask = asked_by(request, ask, gateway)
        answer_id = f"{prefix}-{drawn_id(ask.key, 'answer', 12)}"
        return GenerationResponse(gateway, ask, make_dialect, answer_id, request.state.request_id)

    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await generate(request, parse_chat, ChatDialect, "chatcmpl")

    @app.post("/v1/completions", openapi_extra=_body_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await generate(request, parse_completion, CompletionDialect, "cmpl")


def _add_state(app: FastAPI, gateway: Gateway, node_info: NodeInfo, metrics: Metrics) -> None:
    def ready() -> bool:
        return any(model.state == "ready" for model in gateway.catalogue.models())

    @app.get("/health")
    async def health() -> JSONResponse:
        models = [{"id": m.id, "state": m.state, "detail": m.detail} for m in gateway.catalogue.models()]
        body = {
            "status": "ok" if ready() else "unavailable",
            "node": {"id": node_info.node_id, "name": node_info.name},
            "cluster": node_info.cluster,
            "version": node_info.version,
            "models": models,
            "requests_in_flight": gateway.in_flight,
        }
        return JSONResponse(body, 200 if ready() else 503)

    @app.get("/livez")
    async def livez() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        if not ready():
            raise Unavailable(f"no model is ready: {_why_not_ready(gateway.catalogue.models())}")
        return PlainTextResponse("ok\n")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _why_not_ready(models: list[ServedModel]) -> str:
    if not models:
        return "none is configured on this node"
    return "; ".join(f"{m.id!r} is {m.state}" + (f" ({m.detail})" if m.detail else "") for m in models)


def _body_schema(kind: type[ChatBody] | type[CompletionBody]) -> dict[str, Any]:
    """The schema that /openapi.json shows; bodies are validated by ``schemas``, so that a bad one is a 400."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


async def _not_routed(request: Request, error: Exception) -> Response:
    """What the router refuses, as our own errors, which the middleware answers."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:128]}"
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"{what} is not possible: use {allow}", allow=allow)
    raise RouteNotFound(f"there is no {what}; GET / lists what there is")
