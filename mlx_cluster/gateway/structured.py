"""What an answer must look like: one grammar from structured output, tools that must be called, and reasoning before.

Owns: how the three are put together in llguidance's words.
Does not own: single grammars and their bounds (``mlx_cluster.grammar``), when a request wants which (``prepare``).
Invariant: what these grammars let through, ``splitter`` and the tools' JSON form read back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from mlx_cluster import grammar
from mlx_cluster.gateway.ask import Tool, ToolUse
from mlx_cluster.request import Grammar
from mlx_cluster.tokenizer import harmony
from mlx_cluster.tokenizer.reasoning import Markers
from mlx_cluster.tokenizer.tools import JSON_FORMAT

# A tiny model that may call several tools at once would never stop.
MAX_PARALLEL_CALLS = 8


def check_tools(tools: Sequence[Tool], param: Callable[[int], str]) -> None:
    """Raise ``InvalidRequest`` for the first tool whose schema or grammar cannot constrain its input."""
    for index, tool in enumerate(tools):
        bound = tool.text_grammar or Grammar("json_schema", json.dumps(arguments_schema(tool)))
        grammar.check(bound, param(index))


def arguments_schema(tool: Tool) -> dict[str, Any]:
    return {"type": "object", "properties": {}, **tool.parameters}


def compose(
    main: Grammar | None,
    use: ToolUse | None,
    reasoning: Markers | None,
    *,
    opened: bool,
    special_id: Callable[[str], int | None],
    may_call: bool = False,
) -> Grammar | None:
    """The grammar of a whole answer: reasoning if the model reasons, then ``main`` or calls of the tools.

    ``opened``: the prompt ends inside the reasoning. ``may_call``: the answer is any text, then calls or none, and what
    is JSON in a call is any object. None when nothing is constrained.
    """
    if main is None and use is None:
        return None
    if use is None and reasoning is None:
        return main
    rules: list[str] = []
    bodies: list[str] = []
    parts: list[dict[str, Any]] = []
    if main is not None:
        bodies.append("@main")
        parts.append({**grammar.part_of(main), "name": "main"})
    if use is not None and may_call:
        bodies += ["text", "any_calls"]
        rules += _text_then_call_rules(use)
    elif use is not None:
        bodies.append("calls")
        rules += _call_rules(use)
    if use is not None:
        parts += [
            {**grammar.part_of(tool.text_grammar), "name": f"text{index}"}
            for index, tool in enumerate(_callable(use))
            if tool.text_grammar is not None
        ]
    before = ""
    if reasoning is not None:
        before = "before " if opened else "before? "
        rules += _reasoning_rules(reasoning, opened, special_id)
    lark = "\n".join([f"start: {before}({' | '.join(bodies)})", *rules])
    return Grammar("llguidance", json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}, ensure_ascii=False))


def compose_harmony(main: Grammar | None, use: ToolUse | None, special_id: Callable[[str], int | None]) -> Grammar:
    """The grammar of an answer in the harmony form: analysis if the model likes, then ``main`` as final or one call."""
    channel, message, end, start, constrain = (
        f"<[{special_id(mark)}]>"
        for mark in (harmony.CHANNEL, harmony.MESSAGE, harmony.END, harmony.START, harmony.CONSTRAIN)
    )
    rules = [rf'analysis: {channel} "analysis" {message} THOUGHT {end} {start} "assistant"', r"THOUGHT: /(.|\n)*/"]
    bodies: list[str] = []
    parts: list[dict[str, Any]] = []
    if main is not None:
        bodies.append("final")
        rules.append(f'final: {channel} "final" {message} @main')
        parts.append({**grammar.part_of(main), "name": "main"})
    for index, tool in enumerate(_callable(use) if use is not None else ()):
        bodies.append(f"tool{index}")
        head = f'{channel} {_quoted(f"commentary to=functions.{tool.name} ")} {constrain} "json" {message}'
        rules += [
            f"tool{index}: {head} arguments{index}",
            f"arguments{index}: {grammar.json_rule(arguments_schema(tool))}",
        ]
    lark = "\n".join([f"start: analysis? ({' | '.join(bodies)})", *rules])
    return Grammar("llguidance", json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}, ensure_ascii=False))


def _callable(use: ToolUse) -> list[Tool]:
    return [tool for tool in use.tools if use.only in (None, tool.name)]


def _text_then_call_rules(use: ToolUse) -> list[str]:
    """Text without the mark of a call, or text up to the first such mark and then calls that are whole."""
    mark, begin, end = re.escape(JSON_FORMAT.start), f"{JSON_FORMAT.start}\n", _quoted(f"\n{JSON_FORMAT.end}")
    more = f" ({_quoted(chr(10) + begin)} body){{0,{MAX_PARALLEL_CALLS - 1}}}" if use.parallel else ""
    tools = _callable(use)
    return [
        "text: ANYTHING",
        rf"ANYTHING: /(.|\n)*/ & ~/(.|\n)*{mark}(.|\n)*/",
        f"any_calls: up_to_call body{more}",
        rf"up_to_call[lazy]: /(.|\n)*{mark}\n/",
        f"body: ({' | '.join(f'tool{index}' for index in range(len(tools)))}) {end}",
        *_tool_rules(tools, lambda _: {"type": "object"}),
    ]


def _call_rules(use: ToolUse) -> list[str]:
    tools = _callable(use)
    more = f' ("\\n" call){{0,{MAX_PARALLEL_CALLS - 1}}}' if use.parallel else ""
    begin, end = _quoted(f"{JSON_FORMAT.start}\n"), _quoted(f"\n{JSON_FORMAT.end}")
    rules = [f"calls: call{more}", f"call: {begin} ({' | '.join(f'tool{index}' for index in range(len(tools)))}) {end}"]
    return rules + _tool_rules(tools, arguments_schema)


def _tool_rules(tools: Sequence[Tool], schema_of: Callable[[Tool], dict[str, Any]]) -> list[str]:
    rules: list[str] = []
    for index, tool in enumerate(tools):
        name = json.dumps(tool.name, ensure_ascii=False)
        if tool.text_grammar is not None:
            line = _quoted(f'{{"name": {name}}}\n')
            rules.append(f"tool{index}: {line} @text{index}")
            continue
        opening = _quoted(f'{{"name": {name}, "arguments": ')
        rules += [
            f'tool{index}: {opening} arguments{index} "}}"',
            f"arguments{index}: {grammar.json_rule(schema_of(tool))}",
        ]
    return rules


def _reasoning_rules(markers: Markers, opened: bool, special_id: Callable[[str], int | None]) -> list[str]:
    """Markers that are special tokens are no text to llguidance: it knows them by their ids."""

    def literal(marker: str) -> str:
        token_id = special_id(marker)
        return _quoted(marker) if token_id is None else f"<[{token_id}]>"

    start = "" if opened else literal(markers.start) + " "
    space = r"space: /\s{0,2}/"
    if special_id(markers.end) is not None:
        return [f"before: {start}thought {literal(markers.end)} space", r"thought: /(.|\n)*/", space]
    end = re.escape(markers.end).replace("/", r"\/")
    return [f"before: {start}thought space", rf"thought[lazy]: /(.|\n)*{end}/", space]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
