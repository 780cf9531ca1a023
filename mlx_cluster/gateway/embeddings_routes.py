"""OpenAI's /v1/embeddings.

Owns: its body and the form of its answer (numbers, or little-endian float32 in base64).
Does not own: the vectors (``embed``).
Invariant: one place of the gateway for the whole request; a client that leaves cancels it.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import fields
from mlx_cluster.gateway.answer import Gateway
from mlx_cluster.gateway.body import Body
from mlx_cluster.gateway.client import unless_gone
from mlx_cluster.gateway.embed import MAX_INPUTS, Input, Wish, embed
from mlx_cluster.gateway.incoming import read_parsed
from mlx_cluster.gateway.schemas import json_object, validated


class EmbeddingsBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    def wish(self) -> Wish:
        return Wish(self.model, inputs_of(self.input), self.dimensions)


def inputs_of(given: Any) -> tuple[Input, ...]:
    """One text, one list of token ids, or a list of either. Raises ``InvalidRequest``."""
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > MAX_INPUTS:
            raise _bad(f"input has {len(given)} texts, {MAX_INPUTS} are possible: send several requests", "input")
        return tuple(_single(one, f"input[{index}]") for index, one in enumerate(given))
    return (_single(given, "input"),)


def _single(given: Any, param: str) -> Input:
    if given in ("", []):
        raise _bad(f"{param} is empty: send some text", param)
    if isinstance(given, str):
        return given
    if isinstance(given, list) and all(type(value) is int and 0 <= value < 1 << 31 for value in given):
        return tuple(given)
    raise _bad(f"{param} should be a string, a list of token ids (integers from 0), or a list of either", param)


def _bad(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")


def add_embeddings(app: FastAPI, gateway: Gateway) -> None:
    """Add the route."""

    @app.post("/v1/embeddings", openapi_extra=_body_schema())
    async def embeddings(request: Request) -> Response:
        body = await read_parsed(request, gateway, _parse)
        caller = gateway.keys.caller(request.scope["headers"])
        with gateway.place():
            work = embed(body.wish(), gateway, caller, request.state.request_id)
            found = await unless_gone(request.receive, work)
        data = [
            {"object": "embedding", "index": index, "embedding": _printed(vector, body.encoding_format)}
            for index, vector in enumerate(found.vectors)
        ]
        usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
        return JSONResponse({"object": "list", "data": data, "model": found.model, "usage": usage})


def _printed(vector: Sequence[float], encoding_format: str) -> Any:
    if encoding_format == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _parse(raw: bytes) -> EmbeddingsBody:
    return validated(EmbeddingsBody, fields.honoured(json_object(raw), fields.EMBEDDINGS))


def _body_schema() -> dict[str, object]:
    schema = EmbeddingsBody.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
