"""What /openapi.json says of the routes: bodies as they are really taken, and every status they may answer with.

Owns: the description, made from the field tables (``fields``), the bodies' own schemas and the tables of errors.
Does not own: what happens on a route.
Invariant: what FastAPI would say by itself and is not so (422) does not stand there; a field that a route takes does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from mlx_cluster.gateway import fields
from mlx_cluster.gateway.fields import Rule

_TABLES: Mapping[str, Mapping[str, Rule]] = {
    "/v1/chat/completions": fields.CHAT,
    "/v1/completions": fields.COMPLETION,
    "/v1/responses": fields.RESPONSES,
    "/v1/messages": fields.MESSAGES,
    "/v1/messages/count_tokens": fields.MESSAGES,
    "/tokenize": fields.TOKENIZE,
    "/detokenize": fields.DETOKENIZE,
}
_STRING = {"type": "string"}
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _STRING,
                "type": _STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": _STRING, "message": _STRING},
        },
        "request_id": _STRING,
    },
}
_OLLAMA_ERROR = {"type": "object", "required": ["error"], "properties": {"error": _STRING}}
_WHY = {
    "400": "a value that cannot be served; the error names the parameter and the remedy",
    "401": "no API key, or one that is not known",
    "403": "a Host or Origin that this gateway does not answer to, or a key that may not",
    "404": "no such model, response or route",
    "405": "another method",
    "408": "the body did not arrive in time",
    "409": "the same Idempotency-Key came again, and the answer goes there",
    "413": "the body is too long",
    "415": "the body is not declared as JSON",
    "429": "too many requests; Retry-After says when to come back",
    "431": "the headers are too long",
    "500": "an error of this server; its log has it under the request id",
    "503": "no pipeline serves the model now; Retry-After says when to come back",
    "504": "a limit of time was reached",
    "529": "no pipeline serves the model now (Anthropic's status)",
}
_WITHOUT_BODY = ("400", "401", "403", "404", "405", "429", "431", "500", "503", "504")
_HEADERS = {"x-request-id": {"description": "the client's own, or a new one", "schema": _STRING}}


def describe(app: FastAPI) -> None:
    """Let ``app`` print this description instead of FastAPI's own."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None or "x-complete" not in app.openapi_schema:
            document = copy.deepcopy(plain())
            for path, item in document["paths"].items():
                for method, operation in item.items():
                    _complete(document, path, method, operation)
            document.get("components", {}).get("schemas", {}).pop("HTTPValidationError", None)
            document.get("components", {}).get("schemas", {}).pop("ValidationError", None)
            document["x-complete"] = True
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # FastAPI's documented way to do this


def _complete(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> None:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        schema = _hoisted(document, operation["operationId"], body["schema"])
        table = _TABLES.get(path)
        body["schema"] = schema if table is None else _taken(schema, table)
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["schema"] = {"type": "string", "minLength": 1, "pattern": "^[^/?#]+$"}
    responses = operation["responses"]
    responses.pop("422", None)
    errors = _error_schema(path)
    statuses = _WITHOUT_BODY if body is None else tuple(status for status in _WHY if status != "529")
    if path.startswith("/v1/messages") or path.startswith("/v1/models"):
        statuses = (*statuses, "529")
    for status in statuses:
        content = {"application/json": {"schema": errors}}
        responses.setdefault(status, {"description": _WHY[status], "content": content})
    if path == "/health":
        responses["503"] = {"description": "no model is ready", "content": {"application/json": {"schema": {}}}}
    success = responses["200"]
    if path in ("/livez", "/readyz", "/metrics"):
        success["content"] = {"text/plain": {"schema": _STRING}}
    elif body is not None:
        json_form = success.get("content", {}).get("application/json", {"schema": {}})
        success["content"] = {"application/json": json_form}
        properties = body["schema"].get("properties", {})
        if "stream" in properties:
            stream = "application/x-ndjson" if path.startswith("/api/") else "text/event-stream"
            success["content"][stream] = {"schema": _STRING}
    for answer in responses.values():
        answer.setdefault("headers", {}).update(_HEADERS)


def _error_schema(path: str) -> dict[str, Any]:
    if path.startswith("/v1/messages"):
        return _ANTHROPIC_ERROR
    if path.startswith("/v1/models"):
        return {"anyOf": [_OPENAI_ERROR, _ANTHROPIC_ERROR]}
    return _OLLAMA_ERROR if path.startswith("/api/") else _OPENAI_ERROR


def _hoisted(document: dict[str, Any], prefix: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions among the document's, where its references can reach them."""
    schema = copy.deepcopy(schema)
    definitions = schema.pop("$defs", {})
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    _redirect([schema, definitions], prefix)
    schemas.update({f"{prefix}.{name}": definition for name, definition in definitions.items()})
    return schema


def _redirect(node: Any, prefix: str) -> None:
    if isinstance(node, dict):
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            node["$ref"] = f"#/components/schemas/{prefix}.{reference.removeprefix('#/$defs/')}"
        if isinstance(node.get("oneOf"), list):
            # Which kind it is stands in its type, but what may be of any other type fits more than one.
            node["anyOf"] = node.pop("oneOf")
            node.pop("discriminator", None)
        for value in node.values():
            _redirect(value, prefix)
    elif isinstance(node, list):
        for value in node:
            _redirect(value, prefix)


def _taken(schema: dict[str, Any], table: Mapping[str, Rule]) -> dict[str, Any]:
    """The body with every field of its table: null is as good as absent, advisory ones are anything."""
    typed = schema.get("properties", {})
    required = schema.get("required", [])
    properties: dict[str, Any] = {}
    for name, rule in table.items():
        if rule.kind == "honoured":
            own = typed.get(name, {})
            properties[name] = own if name in required else {"anyOf": [own, {"type": "null"}]}
        elif rule.kind == "refused":
            properties[name] = {"enum": [None, *rule.neutral], "description": rule.why}
        else:
            properties[name] = {"description": rule.why or "has no effect on the output"}
    return {**schema, "properties": properties, "additionalProperties": False}
