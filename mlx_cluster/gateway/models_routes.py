"""Which models there are: GET /v1/models, in the dialect of who asks.

Owns: how a served model looks to a client, the pages of Anthropic's list.
Does not own: the models (``catalogue``).
Invariant: every configured model is listed, ready or not, with its state.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import messages_errors, models_codex
from mlx_cluster.gateway.answer import Gateway
from mlx_cluster.gateway.catalogue import is_pattern
from mlx_cluster.request import ServedModel

DEFAULT_PAGE = 20
MAX_PAGE = 1000


def add_models(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes."""

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        models = gateway.catalogue.models()
        if models_codex.asked(request.query_params):
            return models_codex.model_list(models)
        if messages_errors.asked(request.scope):
            return _page(models, request)
        return {"object": "list", "data": [_openai(model) for model in models]}

    @app.get("/v1/models/{model_id:path}")
    async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
        model = gateway.catalogue.find(model_id)
        return _anthropic(model) if messages_errors.asked(request.scope) else _openai(model)


def _openai(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "mlx-cluster",
        **_aliases(model),
        "max_context": model.max_context,
        "max_model_len": model.max_context,  # where clients of other local servers look for it
        "context_length": model.max_context,
        "state": model.state,
    }


def _anthropic(model: ServedModel) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.id,
        "created_at": created,
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "max_input_tokens": model.max_context,
        "max_tokens": model.max_context,
        **_aliases(model),
        "state": model.state,
    }


def _aliases(model: ServedModel) -> dict[str, list[str]]:
    """Other names of the model, and the forms of names (``claude-*``) that stand for it."""
    return {
        "aliases": [alias for alias in model.aliases if not is_pattern(alias)],
        "alias_patterns": [alias for alias in model.aliases if is_pattern(alias)],
    }


def _page(models: list[ServedModel], request: Request) -> dict[str, Any]:
    """A page of Anthropic's list: up to ``limit`` models after ``after_id``, or the last ones before ``before_id``."""
    limit = _limit(request.query_params.get("limit"))
    after, before = request.query_params.get("after_id"), request.query_params.get("before_id")
    if after and before:
        raise InvalidRequest("after_id and before_id exclude each other: send one", param="before_id")
    start, end = 0, len(models)
    if after:
        start = _position(models, after, "after_id") + 1
    if before:
        end = _position(models, before, "before_id")
    chosen = models[max(start, end - limit) : end] if before else models[start : min(end, start + limit)]
    return {
        "data": [_anthropic(model) for model in chosen],
        "first_id": chosen[0].id if chosen else None,
        "last_id": chosen[-1].id if chosen else None,
        "has_more": end - start > len(chosen),
    }


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_PAGE
    if text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= MAX_PAGE:
        return int(text[:6])
    raise InvalidRequest(f"limit is {text[:32]!r}: it should be a number from 1 to {MAX_PAGE}", param="limit")


def _position(models: list[ServedModel], model_id: str, param: str) -> int:
    for index, model in enumerate(models):
        if model.id == model_id:
            return index
    raise InvalidRequest(f"{param}: there is no model {model_id[:128]!r} in the list", param=param)
