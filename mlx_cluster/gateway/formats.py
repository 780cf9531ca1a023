"""Structured output and reasoning as requests ask for them: OpenAI's fields, and vLLM's names for what OpenAI lacks.

Owns: ``response_format``, ``guided_*``, ``structured_outputs``, ``reasoning_effort``, ``chat_template_kwargs``: their
types, and the way to a ``Grammar`` and to a template's values.
Does not own: putting a grammar together with tools and reasoning (``structured``).
Invariant: at most one grammar binds an answer; a grammar that cannot be served is refused with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_cluster import grammar
from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.body import Body
from mlx_cluster.request import Grammar

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=grammar.MAX_CHOICES)
]
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')
# What a client may tell a chat template by name: all else would let it rewrite the conversation around the messages.
TEMPLATE_NAMES = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "clear_thinking": bool,
    "reasoning_effort": str,
}


class JsonSchema(Body):
    """``strict`` is how it is always meant here: the answer follows the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = "answer"
    description: str | None = None
    # "schema" is a method's name of pydantic's
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = Field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's one field for what its ``guided_*`` ask for. Exactly one of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None


class Structured(Body):
    """The fields that both routes have."""

    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


def grammar_of(body: Structured, response_format: ResponseFormat | None = None) -> tuple[Grammar | None, str]:
    """The grammar that a request asks for and its field's name. Raises ``InvalidRequest``."""
    found: list[tuple[Grammar, str]] = []
    if response_format is not None and response_format.type == "json_object":
        found.append((ANY_OBJECT, "response_format"))
    elif response_format is not None and response_format.type == "json_schema":
        if response_format.json_schema is None:
            param = "response_format.json_schema"
            raise InvalidRequest(f"{param} is required: add it", param=param, code="missing_required_parameter")
        source = json.dumps(response_format.json_schema.schema_, ensure_ascii=False)
        found.append((Grammar("json_schema", source), "response_format"))
    found += _guided("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if body.structured_outputs is not None:
        outputs = body.structured_outputs
        inner = _guided("structured_outputs.", outputs.json_, outputs.regex, outputs.choice, outputs.grammar)
        if outputs.json_object:
            inner.append((ANY_OBJECT, "structured_outputs.json_object"))
        if not inner:
            raise InvalidRequest("structured_outputs is empty: name what it should follow", param="structured_outputs")
        found += inner
    if len(found) > 1:
        names = " and ".join(name for _, name in found)
        raise InvalidRequest(f"{names} both bind the answer: leave one out", param=found[1][1], code="invalid_value")
    if not found:
        return None, "response_format"
    wanted, param = found[0]
    grammar.check_bounds(wanted, param)  # the rest takes longer: ``prepare`` does it, off the event loop
    return wanted, param


def _guided(
    prefix: str, schema: Any, regex: str | None, choice: list[str] | None, lark: str | None
) -> list[tuple[Grammar, str]]:
    found: list[tuple[Grammar, str]] = []
    if schema is not None:
        source = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        found.append((Grammar("json_schema", source), f"{prefix}json"))
    if regex is not None:
        found.append((Grammar("regex", regex), f"{prefix}regex"))
    if choice is not None:
        found.append((Grammar("choice", json.dumps(choice, ensure_ascii=False)), f"{prefix}choice"))
    if lark is not None:
        found.append((Grammar("lark", lark), f"{prefix}grammar"))
    return found


def effort_values(effort: str | None) -> dict[str, Any]:
    """What a chat template is told of the wished effort, by every name that templates know. It is a hint: a template
    that knows none of them renders as without it."""
    if effort is None:
        return {}
    thinks = effort != "none"
    values: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    return {**values, "reasoning_effort": effort} if thinks else values


def template_values(effort: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """``chat_template_kwargs`` over ``reasoning_effort``. Raises ``InvalidRequest`` for a name that is not allowed."""
    for name, value in given.items():
        param = f"chat_template_kwargs.{name[:64]}"
        kind = TEMPLATE_NAMES.get(name)
        if kind is None:
            allowed = ", ".join(TEMPLATE_NAMES)
            raise InvalidRequest(f"{param} is not allowed: allowed are {allowed}", param=param, code="invalid_value")
        if type(value) is not kind:
            raise InvalidRequest(f"{param} should be a {kind.__name__}", param=param, code="invalid_value")
    return {**effort_values(effort), **given}
