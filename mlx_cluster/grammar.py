"""What may be asked of structured output, in llguidance's words: compiled by the last stage, checked by a gateway.

Owns: the translation of a ``request.Grammar`` and its bounds; both sides use it, so that what a gateway lets pass is
what a stage compiles.
Does not own: matchers and masks (``model.grammar``), what a dialect calls a grammar (``gateway.structured``).
Invariant: what ``check`` lets pass, llguidance can parse; nothing here needs a model.

llguidance recurses on the stack: a chain of some thousand rules or references, and an integer that is the least of 64
bits, end the *process* that parses them. The bounds are there so that no request can reach that, and were measured.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.request import Grammar

# A grammar travels to every stage with its row's first header, and is compiled once for each row.
MAX_SOURCE_BYTES = 128 * 1024
MAX_DEPTH = 64
MAX_CHOICES = 512
# 1,000 definitions of which each has the next one as a property overflow a stack of 8 MB; 4,000 rules of Lark do.
MAX_REFERENCES = 256
MAX_LARK_RULES = 256
# What it costs to build an automaton grows with the square of its pattern: 80 KB of "a?" take 21 s and 3 GB.
MAX_PATTERN_BYTES = 8 * 1024
MAX_LARK_BYTES = 16 * 1024
# llguidance negates a negative integer to print it, and the least one has no counterpart. As floats they are fine.
_LEAST_INTEGER = re.compile(r"-9223372036854775\d{3}(?![0-9.eE])")
_LARK_RULE = re.compile(r"^\s*[?!]*[A-Za-z_]\w*[^\n:]*:", re.MULTILINE)

# One optional space after a separator and none elsewhere: with free whitespace a model can dawdle for ever between
# two tokens of JSON, and small ones do.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def to_llguidance(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises ``ValueError`` when the source is not even JSON where it should be, or
    would end the process."""
    if least := _LEAST_INTEGER.search(grammar.source):
        raise ValueError(f"{least[0]} is too close to the least integer of 64 bits: write it as {least[0]}.0")
    if grammar.kind == "llguidance":
        return grammar.source
    return json.dumps({"grammars": [part_of(grammar)]}, ensure_ascii=False)


def part_of(grammar: Grammar) -> dict[str, Any]:
    """One of the grammars that llguidance's form lists. Raises ``ValueError``."""
    match grammar.kind:
        case "json_schema":
            schema = json.loads(grammar.source)
            # Only an object takes options. True stands for any value; False, and what is no schema, is refused later.
            return {"json_schema": with_style({} if schema is True else schema)}
        case "regex":
            return dict(json.loads(LLMatcher.grammar_from_regex(grammar.source))["grammars"][0])
        case "lark":
            return {"lark_grammar": grammar.source}
        case "choice":
            return {"lark_grammar": choice_rule(json.loads(grammar.source))}
        case "llguidance":
            raise ValueError("a grammar that has parts is no part of another")


def with_style(schema: Any) -> Any:
    return {**schema, "x-guidance": JSON_STYLE} if isinstance(schema, dict) else schema


def choice_rule(choices: list[str]) -> str:
    """A Lark grammar that says one of these strings."""
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def json_rule(schema: Any) -> str:
    """A JSON schema as the right side of a Lark rule."""
    return "%json " + json.dumps(with_style(schema), ensure_ascii=False)


def check_bounds(grammar: Grammar, param: str) -> None:
    """Raise ``InvalidRequest`` for a source that is too large or no JSON: what can be told at once.

    ``param`` is the client's name for the grammar.
    """
    size = len(grammar.source.encode("utf-8", "replace"))
    if size > MAX_SOURCE_BYTES:
        raise _invalid(f"it has {size} bytes, {MAX_SOURCE_BYTES} are possible: make it smaller", param)
    for kinds, most in ((("regex",), MAX_PATTERN_BYTES), (("lark",), MAX_LARK_BYTES)):
        if grammar.kind in kinds and size > most:
            raise _invalid(f"it has {size} bytes, {most} are possible for this kind: make it smaller", param)
    if grammar.kind == "lark" and (rules := len(_LARK_RULE.findall(grammar.source))) > MAX_LARK_RULES:
        raise _invalid(f"it has {rules} rules, {MAX_LARK_RULES} are possible: join some", param)
    if grammar.kind not in ("json_schema", "choice"):
        return
    try:
        _check_value(json.loads(grammar.source), param)
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error), param) from None


def check(grammar: Grammar, param: str) -> None:
    """Raise ``InvalidRequest`` with the reason when a grammar cannot be served.

    It is compiled for this, which takes up to a second for the largest ones: keep it off an event loop.
    """
    check_bounds(grammar, param)
    try:
        source = to_llguidance(grammar)
        source.encode()  # JSON may name half a character, which no text can hold
    except ValueError as error:
        raise _invalid(str(error), param) from None
    is_error, messages = LLMatcher.validate_grammar_with_warnings(source)
    if is_error:
        raise _invalid(messages[0], param)
    if grammar.kind == "llguidance":
        return  # it may name tokens of the model by their ids, which only the model's tokenizer has
    matcher = LLMatcher(_bytes_alone(), source, log_level=0)
    matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error().partition("<state>")[0].strip()
        raise _invalid("nothing follows it" if reason.startswith("NoExtension") else reason, param)


@functools.cache
def _bytes_alone() -> LLTokenizer:
    """A tokenizer of 256 bytes: enough to see whether a grammar comes to anything."""
    return LLTokenizer("byte")


def _invalid(reason: str, param: str) -> InvalidRequest:
    shown = " ".join(reason.encode("utf-8", "replace").decode().split())[:500]
    return InvalidRequest(f"{param} cannot be served: {shown}", param=param, code="invalid_grammar")


def _check_value(root: Any, param: str) -> None:
    """The bounds of a schema. Walks by hand, since it may be deeper than Python's stack."""
    deepest, waiting = 0, [(root, 1)]
    references: set[str] = set()
    while waiting:
        node, level = waiting.pop()
        if not isinstance(node, dict | list):
            continue
        deepest = max(deepest, level)
        waiting += [(child, level + 1) for child in (node.values() if isinstance(node, dict) else node)]
        if isinstance(node, dict):
            references |= {target for name in ("$ref", "$dynamicRef") if isinstance(target := node.get(name), str)}
            named = node.get("patternProperties")
            patterns = [node.get("pattern"), *(named if isinstance(named, dict) else ())]
            longest = max((len(text) for text in patterns if isinstance(text, str)), default=0)
            if longest > MAX_PATTERN_BYTES:
                raise _invalid(f"a pattern has {longest} characters, {MAX_PATTERN_BYTES} are possible", param)
    if deepest > MAX_DEPTH:
        raise _invalid(f"it is nested {deepest} levels deep, {MAX_DEPTH} are possible: flatten it", param)
    if len(references) > MAX_REFERENCES:
        raise _invalid(f"it refers to {len(references)} definitions, {MAX_REFERENCES} are possible: join some", param)
