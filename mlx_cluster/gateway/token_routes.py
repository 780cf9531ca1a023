"""Text to token ids and back: /tokenize and /detokenize.

Owns: these routes and their bodies.
Does not own: rendering of conversations (``prepare``), the tokenizer.
Invariant: what /tokenize gives for a prompt or a conversation is what the model would be given for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import fields
from mlx_cluster.gateway.answer import Gateway
from mlx_cluster.gateway.ask import Ask
from mlx_cluster.gateway.body import Body
from mlx_cluster.gateway.incoming import read_parsed
from mlx_cluster.gateway.prepare import prompt_ids
from mlx_cluster.gateway.schemas import ChatBody, json_object, validated
from mlx_cluster.tokenizer import Tokenizer


class TokenizeBody(Body):
    """A plain ``prompt``. Conversations are validated as chat completions are."""

    model: str
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str
    tokens: list[Annotated[int, Field(ge=0)]]


def add_tokens(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes."""
    catalogue = gateway.catalogue

    @app.post("/tokenize", openapi_extra=_body_schema(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        values = await read_parsed(request, gateway, _parse_tokenize)
        if "messages" in values:
            ask, with_names = _chat_ask(values)
            ids = await prompt_ids(ask, catalogue)
            model = catalogue.find(ask.model)
        else:
            body = validated(TokenizeBody, values)
            with_names, model = body.return_token_strs, catalogue.find(body.model)
            tokenizer = await catalogue.tokenizer(model)
            ids = await catalogue.off_loop(_encode, tokenizer, body)
        tokenizer = await catalogue.tokenizer(model)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_context, "tokens": list(ids)}
        if with_names:
            answer["token_strs"] = await catalogue.off_loop(_names, tokenizer, ids)
        return JSONResponse(answer)

    @app.post("/detokenize", openapi_extra=_body_schema(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await read_parsed(request, gateway, _parse_detokenize)
        tokenizer = await catalogue.tokenizer(catalogue.find(body.model))
        return JSONResponse({"prompt": await catalogue.off_loop(_decode, tokenizer, body.tokens)})


def _parse_tokenize(raw: bytes) -> dict[str, Any]:
    return fields.honoured(json_object(raw), fields.TOKENIZE)


def _parse_detokenize(raw: bytes) -> DetokenizeBody:
    return validated(DetokenizeBody, fields.honoured(json_object(raw), fields.DETOKENIZE))


def _chat_ask(values: dict[str, Any]) -> tuple[Ask, bool]:
    """A conversation as the chat route takes it, and whether the tokens' names are wanted."""
    for name in ("prompt", "add_special_tokens"):
        if name in values:
            raise InvalidRequest(f"{name} and messages exclude each other: send one of them", param=name)
    with_names = values.pop("return_token_strs", False)
    if not isinstance(with_names, bool):
        raise InvalidRequest("return_token_strs: should be true or false", param="return_token_strs")
    return validated(ChatBody, values).to_ask(), with_names


def _encode(tokenizer: Tokenizer, body: TokenizeBody) -> tuple[int, ...]:
    return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in ids]


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of these ids, special tokens by their names. Raises ``InvalidRequest`` for an unknown id."""
    for token_id in ids:
        if token_id >= tokenizer.vocab_size:
            raise InvalidRequest(
                f"tokens: {token_id} is not an id of this model, which has {tokenizer.vocab_size}",
                param="tokens",
                code="invalid_value",
            )
    # A decoder shows the special tokens that its markers hold, and all that are here should be shown.
    decoder = tokenizer.decoder(("".join(tokenizer.token_text(token_id) for token_id in dict.fromkeys(ids)),))
    return "".join([*(decoder.push(token_id) for token_id in ids), decoder.flush()])


def _body_schema(kind: type[Body]) -> dict[str, object]:
    return _json_body(kind.model_json_schema())


def _json_body(schema: dict[str, Any]) -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
