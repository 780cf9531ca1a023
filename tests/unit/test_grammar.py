"""What a gateway lets pass is what a stage can compile; everything else is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from mlx_cluster import grammar
from mlx_cluster.errors import InvalidRequest
from mlx_cluster.request import Grammar


@pytest.mark.parametrize(
    "good",
    [
        Grammar("json_schema", '{"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {}}}'),
        Grammar("json_schema", "true"),
        Grammar("regex", r"\d{3}-[a-z]+"),
        Grammar("lark", 'start: "a" b\nb: /x+/'),
        Grammar("choice", json.dumps(['say "hi"', "é\n", "<|im_end|>", "\\"])),
    ],
    ids=lambda good: good.kind,
)
def test_what_passes_compiles(good: Grammar) -> None:
    grammar.check(good, "response_format")
    assert LLMatcher.validate_grammar(grammar.to_llguidance(good)) == ""


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"not": {}}'), "not"),
        (Grammar("json_schema", '{"type": "strin"}'), "strin"),
        (Grammar("json_schema", "false"), "schema is false"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "nowhere"),
        (Grammar("json_schema", "{"), "Expecting"),
        (Grammar("json_schema", json.dumps(nested(70))), "flatten"),
        (Grammar("json_schema", json.dumps({"const": "x" * 300_000})), "131072"),
        (Grammar("json_schema", '{"$ref": "#"}'), "nothing follows"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'), "not present"),
        (Grammar("json_schema", '{"const": "\\ud800"}'), "surrogate|UTF-8|utf-8"),
        (Grammar("lark", "start: start"), "nothing follows"),
        (Grammar("regex", "a(b"), "unclosed group"),
        (Grammar("lark", "start: unknown"), "unknown name"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_what_cannot_be_served_is_refused_with_the_reason(bad: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        grammar.check(bad, "response_format")
    assert caught.value.param == "response_format"
    assert caught.value.code == "invalid_grammar"
