"""Anthropic's routes: /v1/messages and /v1/messages/count_tokens.

Owns: their headers, and the order read → parse → answer.
Does not own: bodies (``messages``), printing (``messages_dialect``), authentication (both header styles of this dialect
are accepted and ignored while there is none).
Invariant: whatever a client asked for in vain stands in ``x-mlx-cluster-ignored``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mlx_cluster.gateway.answer import Gateway, GenerationResponse
from mlx_cluster.gateway.idempotency import drawn_id
from mlx_cluster.gateway.incoming import add_answer_header, asked_by, hints_in_vain, name_dropped, read_parsed
from mlx_cluster.gateway.messages import MessagesBody, Parsed, parse_count, parse_messages
from mlx_cluster.gateway.messages_dialect import MessagesDialect
from mlx_cluster.gateway.messages_errors import PATH
from mlx_cluster.gateway.prepare import count_prompt

# Betas whose effect is there, or that ask for nothing that shows in an answer. By their name without the date.
_KNOWN_BETAS = frozenset(
    {
        "claude-code",
        "oauth",
        "token-counting",
        "prompt-caching",
        "prompt-caching-scope",
        "extended-cache-ttl",
        "context-management",
        "output-128k",
        "max-tokens-3-5-sonnet",
        "fine-grained-tool-streaming",
        "token-efficient-tools",
    }
)
_DATE = re.compile(r"-\d{4}-?\d{2}-?\d{2}$")


def add_messages(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes of this dialect."""

    async def read(request: Request, parse: Callable[[bytes], Parsed]) -> Parsed:
        # Where the SDKs of this dialect look for the request's id.
        add_answer_header(request, b"request-id", request.state.request_id.encode())
        parsed = await read_parsed(request, gateway, parse)
        vain = await hints_in_vain(parsed.ask, gateway)
        name_dropped(request, [*parsed.dropped, *vain, *_unknown_betas(request)])
        return parsed

    @app.post(PATH, openapi_extra=_body_schema())
    async def messages(request: Request) -> Response:
        parsed = await read(request, parse_messages)
        wanted = parsed.ask.max_tokens
        ask = asked_by(request, parsed.ask, gateway)
        return GenerationResponse(
            gateway,
            ask,
            lambda head, _: MessagesDialect(head, wanted),
            f"msg_{drawn_id(ask.key, 'answer', 12)}",
            request.state.request_id,
        )

    @app.post(f"{PATH}/count_tokens", openapi_extra=_body_schema())
    async def count_tokens(request: Request) -> Response:
        parsed = await read(request, parse_count)
        return JSONResponse({"input_tokens": await count_prompt(parsed.ask, gateway.catalogue)})


def _unknown_betas(request: Request) -> list[str]:
    listed = ",".join(request.headers.getlist("anthropic-beta"))
    betas = (beta.strip() for beta in listed.split(","))
    return [beta for beta in betas if beta and _DATE.sub("", beta) not in _KNOWN_BETAS]


def _body_schema() -> dict[str, object]:
    schema = MessagesBody.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
