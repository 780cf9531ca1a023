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


LEAST = -(2**63)


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("json_schema", json.dumps({"const": LEAST}), "write it as"),
        ("json_schema", json.dumps({"enum": [1, LEAST + 300]}), "write it as"),
        ("lark", f'start: %json {{"const": {LEAST}}}', "write it as"),
        ("regex", "a?" * 5000, "8192 are possible"),
        ("lark", "start: A\nA: /" + "a?" * 9000 + "/", "16384 are possible"),
        ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(400)) + '\nr400: "a"', "402 rules"),
        ("json_schema", json.dumps({"type": "string", "pattern": "a?" * 5000}), "a pattern has 10000"),
        (
            "json_schema",
            json.dumps({"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(900)}}),
            "definitions",
        ),
    ],
)
def test_what_would_end_the_process_or_eat_its_memory_is_refused(kind: Any, source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        grammar.check(Grammar(kind, source), "g")


def test_numbers_near_the_least_integer_are_served() -> None:
    for value in (-(2**63) + 2000, float(LEAST), 2**63 - 1):
        grammar.check(Grammar("json_schema", json.dumps({"const": value})), "g")
    deep = {f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(250)}
    grammar.check(Grammar("json_schema", json.dumps({"$ref": "#/$defs/a0", "$defs": {**deep, "a250": {}}})), "g")
