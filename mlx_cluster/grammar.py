"""What may be asked of structured output, in llguidance's words: compiled by the last stage, checked by a gateway.

Owns: the translation of a ``request.Grammar`` and its bounds; both sides use it, so that what a gateway lets pass is
what a stage compiles.
Does not own: matchers and masks (``model.grammar``), what a dialect calls a grammar (``gateway.structured``).
Invariant: what ``check`` lets pass, llguidance can parse; nothing here needs a model.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.request import Grammar

# A grammar travels to every stage with its row's first header, and is compiled once for each row.
MAX_SOURCE_BYTES = 128 * 1024
MAX_DEPTH = 64
MAX_CHOICES = 512

# One optional space after a separator and none elsewhere: with free whitespace a model can dawdle for ever between
# two tokens of JSON, and small ones do.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def to_llguidance(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises ``ValueError`` when the source is not even JSON where it should be."""
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
    try:
        if grammar.kind in ("json_schema", "choice") and (depth := _depth(json.loads(grammar.source))) > MAX_DEPTH:
            raise _invalid(f"it is nested {depth} levels deep, {MAX_DEPTH} are possible: flatten it", param)
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


def _depth(value: Any) -> int:
    """How deep lists and objects are nested; walks by hand, since the value may be deeper than Python's stack."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        node, level = waiting.pop()
        if isinstance(node, dict | list):
            deepest = max(deepest, level)
            waiting += [(child, level + 1) for child in (node.values() if isinstance(node, dict) else node)]
    return deepest
