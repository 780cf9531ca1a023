"""Ollama's routes: chat, generate, embed, and what it says of models.

Owns: the routes below /api/, how a served model looks to such a client.
Does not own: bodies (``ollama``), printing (``ollama_dialect``), vectors (``embed``).
Invariant: names may end in ``:latest``; models are not loaded, unloaded, pulled or changed by a client.
"""

from __future__ import annotations

import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlx_cluster.gateway import fields
from mlx_cluster.gateway.answer import Gateway, GenerationResponse
from mlx_cluster.gateway.body import Body
from mlx_cluster.gateway.client import unless_gone
from mlx_cluster.gateway.embed import Vectors, Wish, embed
from mlx_cluster.gateway.embeddings_routes import inputs_of
from mlx_cluster.gateway.idempotency import drawn_id
from mlx_cluster.gateway.incoming import asked_by, hints_in_vain, name_dropped, read_parsed
from mlx_cluster.gateway.ollama import LATEST, ChatBody, GenerateBody, Parsed, parse_chat, parse_generate
from mlx_cluster.gateway.ollama_dialect import CONTENT_TYPE, OllamaDialect, now
from mlx_cluster.gateway.schemas import json_object, validated
from mlx_cluster.request import ServedModel

# The version of Ollama whose API this is: clients ask for it to know what they may use.
API_VERSION = "0.12.11"
# What is served stays loaded; clients want a date all the same.
NEVER = "9999-12-31T23:59:59Z"


class EmbedBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Any
    truncate: bool = True
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class OldEmbedBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    prompt: Annotated[str, Field(min_length=1)]


class ShowBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]


def add_ollama(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes of this dialect."""
    _add_generation(app, gateway)
    _add_vectors(app, gateway)
    _add_models(app, gateway)


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    async def answer(request: Request, parsed: Parsed, *, chat: bool) -> Response:
        started_ns, name, ask = time.monotonic_ns(), parsed.body.model, parsed.ask
        if ask is None:
            return _loaded(gateway.catalogue.find(name.removesuffix(LATEST)), name, chat=chat)
        name_dropped(request, [*parsed.dropped, *await hints_in_vain(ask, gateway)])
        ask = asked_by(request, ask, gateway)
        return GenerationResponse(
            gateway,
            ask,
            lambda head, tokenizer: OllamaDialect(head, tokenizer, name, chat=chat, started_ns=started_ns),
            f"ollama-{drawn_id(ask.key, 'answer', 12)}",
            request.state.request_id,
            content_type=CONTENT_TYPE,
        )

    @app.post("/api/chat", openapi_extra=_body_schema(ChatBody))
    async def chat(request: Request) -> Response:
        return await answer(request, await read_parsed(request, gateway, parse_chat), chat=True)

    @app.post("/api/generate", openapi_extra=_body_schema(GenerateBody))
    async def generate(request: Request) -> Response:
        return await answer(request, await read_parsed(request, gateway, parse_generate), chat=False)


def _loaded(model: ServedModel, name: str, *, chat: bool) -> Response:
    """A request without a prompt asks to load the model, or with keep_alive 0 to forget it: neither is a client's."""
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    reason = "load" if model.state == "ready" else model.state
    return JSONResponse({"model": name, "created_at": now(), **said, "done": True, "done_reason": reason})


def _add_vectors(app: FastAPI, gateway: Gateway) -> None:
    async def vectors(request: Request, wish: Wish) -> Vectors:
        caller = gateway.keys.caller(request.scope["headers"])
        with gateway.place():
            return await unless_gone(request.receive, embed(wish, gateway, caller, request.state.request_id))

    @app.post("/api/embed", openapi_extra=_body_schema(EmbedBody))
    async def embed_texts(request: Request) -> Response:
        started_ns = time.monotonic_ns()
        body = await read_parsed(request, gateway, lambda raw: _parse(EmbedBody, raw, "OLLAMA_EMBED"))
        wish = Wish(body.model.removesuffix(LATEST), inputs_of(body.input), body.dimensions, truncates=body.truncate)
        found = await vectors(request, wish)
        return JSONResponse(
            {
                "model": body.model,
                "embeddings": [list(vector) for vector in found.vectors],
                "total_duration": time.monotonic_ns() - started_ns,
                "load_duration": 0,
                "prompt_eval_count": found.prompt_tokens,
            }
        )

    @app.post("/api/embeddings", openapi_extra=_body_schema(OldEmbedBody))
    async def embed_prompt(request: Request) -> Response:
        body = await read_parsed(request, gateway, lambda raw: _parse(OldEmbedBody, raw, "OLLAMA_EMBEDDINGS"))
        wish = Wish(body.model.removesuffix(LATEST), (body.prompt,), truncates=True, input_field="prompt")
        found = await vectors(request, wish)
        return JSONResponse({"embedding": list(found.vectors[0])})


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    catalogue = gateway.catalogue

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": API_VERSION}

    @app.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [await catalogue.off_loop(_listed, model) for model in catalogue.models()]}

    @app.get("/api/ps")
    async def running() -> dict[str, Any]:
        ready = [model for model in catalogue.models() if model.state == "ready"]
        listed = [await catalogue.off_loop(_listed, model) for model in ready]
        return {
            "models": [
                {**entry, "size_vram": entry["size"], "expires_at": NEVER, "context_length": model.max_context}
                for entry, model in zip(listed, ready, strict=True)
            ]
        }

    @app.post("/api/show", openapi_extra=_body_schema(ShowBody))
    async def show(request: Request) -> Response:
        body = await read_parsed(request, gateway, _parse_show)
        model = catalogue.find(body.model.removesuffix(LATEST))
        tokenizer = await catalogue.tokenizer(model)
        listed = await catalogue.off_loop(_listed, model)
        family = listed["details"]["family"]
        able = {
            "completion": model.embeddings is None,
            "tools": model.embeddings is None and tokenizer.has_chat_template,
            "thinking": tokenizer.reasoning is not None,
            "insert": tokenizer.fim is not None,
            "embedding": model.embeddings is not None,
        }
        return JSONResponse(
            {
                "modelfile": "",
                "parameters": "",
                "template": tokenizer.template,
                "details": listed["details"],
                "model_info": {
                    "general.architecture": family,
                    "general.basename": model.id,
                    f"{family}.context_length": model.max_context,
                },
                "capabilities": [name for name, can in able.items() if can],
                "modified_at": listed["modified_at"],
            }
        )


def _listed(model: ServedModel) -> dict[str, Any]:
    """A model as a list shows it; it looks at this node's disk."""
    config = _config(model.model_dir)
    family = str(config.get("model_type", "unknown"))
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    name = model.id if ":" in model.id else model.id + LATEST
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z"),
        "size": _size_bytes(model.model_dir),
        "digest": hashlib.sha256(model.id.encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "mlx",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": f"{bits}-bit" if bits else str(config.get("torch_dtype") or ""),
        },
    }


def _config(model_dir: str) -> dict[str, Any]:
    try:
        found = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8")) if model_dir else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _size_bytes(model_dir: str) -> int:
    try:
        return sum(path.stat().st_size for path in Path(model_dir).glob("*.safetensors")) if model_dir else 0
    except OSError:
        return 0


def _parse(kind: Any, raw: bytes, table: str) -> Any:
    return validated(kind, fields.honoured(json_object(raw), getattr(fields, table)))


def _parse_show(raw: bytes) -> ShowBody:
    values = json_object(raw)
    if "name" in values and "model" not in values:  # as it was called once
        values["model"] = values.pop("name")
    return validated(ShowBody, fields.honoured(values, fields.OLLAMA_SHOW))


def _body_schema(kind: type[Body]) -> dict[str, object]:
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
