"""Tools: how a model is told of them, and how it writes a call.

Owns: which of mlx-lm's tool parsers a chat template asks for; the plain instruction for templates that know no tools;
the JSON form, in which constrained calls are written whatever the family.
Does not own: finding calls in a stream (the gateway), schemas of arguments (the gateway and ``mlx_cluster.grammar``).
Invariant: what does not parse as a call is no call; nothing of a call's text is ever evaluated.

A template that knows tools gets them and its calls are read in its own format. One that does not, or whose format is
unknown here, gets a system instruction instead, and calls are JSON between ``<tool_call>`` and ``</tool_call>``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cluster.errors import CheckpointError

# What parsers raise for text that they did not foresee; the last two for text that is nested too deep.
_NO_CALL = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SyntaxError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls stand in an answer: between ``start`` and ``end`` (an empty end: up to the answer's own).

    ``incremental`` says that the text between is JSON, so that arguments can be shown as they come.
    """

    name: str
    start: str
    end: str
    read: Callable[[str, Any], Any]
    incremental: bool = False

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> list[ParsedCall]:
        """The calls in ``text``, which stood between the markers. Raises ``ValueError`` when it is none."""
        try:
            found = self.read(text, list(tools))
            return [_call(item) for item in (found if isinstance(found, list) else [found])]
        except _NO_CALL as error:
            raise ValueError(f"no tool call: {error}") from error


def _call(item: Any) -> ParsedCall:
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise ValueError("no tool call: it has no name")
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, Mapping):
        raise ValueError("no tool call: its arguments are no object")
    return ParsedCall(item["name"], json.dumps(arguments, ensure_ascii=False))


def _read_json(text: str, _tools: Any) -> Any:
    return json.loads(text)


def _read_json_or_text(text: str, _tools: Any) -> Any:
    """A call in the JSON form; or one line that names a tool, and then its plain text."""
    name, newline, body = text.removeprefix("\n").removesuffix("\n").partition("\n")
    if newline:
        found = json.loads(name)
        if isinstance(found, dict) and found.keys() == {"name"}:
            return {**found, "arguments": {"input": body}}
    return json.loads(text)


JSON_FORMAT = ToolFormat("json", "<tool_call>", "</tool_call>", _read_json, incremental=True)

# The JSON form, with tools beside whose input is plain text: how a grammar lets them be called.
JSON_OR_TEXT_FORMAT = ToolFormat("json_or_text", "<tool_call>", "</tool_call>", _read_json_or_text, incremental=True)

# Which parser of mlx-lm reads a family's calls, by what its chat template contains. More special marks come first.
_BY_TEMPLATE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>",)),
)
_PARSERS = "mlx_cluster_tool_parsers"


def find_format(template: str, vocabulary: Container[str]) -> ToolFormat | None:
    """The format of a template that knows tools; None when it does not, or in a format unknown here."""
    if not re.search(r"\btools\b", template):
        return None
    for name, marks in _BY_TEMPLATE:
        if all(mark in template for mark in marks):
            return JSON_FORMAT if name == "json_tools" else _format_of(name)
    if "<|tool_call_start|>" in vocabulary and "<|tool_call_end|>" in vocabulary:
        return _format_of("pythonic")
    return None


def _format_of(name: str) -> ToolFormat:
    """One of mlx-lm's parsers. They are text alone, but mlx_lm's own package would bring mlx and take a second."""
    if _PARSERS not in sys.modules:
        found = importlib.util.find_spec("mlx_lm")
        places = list(found.submodule_search_locations or ()) if found is not None else []
        folder = Path(places[0]) / "tool_parsers" if places else Path()
        spec = importlib.util.spec_from_file_location(
            _PARSERS, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise CheckpointError("mlx-lm's tool parsers are not installed: install mlx-lm")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[_PARSERS] = module
    parser = importlib.import_module(f"{_PARSERS}.{name}")
    return ToolFormat(name, parser.tool_call_start, parser.tool_call_end, parser.parse_tool_call)


_INSTRUCTION = """You may call functions to help with the user's request. They are:
{tools}

To call one, answer with a JSON object of its name and arguments between these tags, and nothing after them:
<tool_call>
{{"name": "NAME", "arguments": {{…}}}}
</tool_call>
The results come back between <tool_response> and </tool_response>."""


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with ids of nine letters and digits, the only ones that Mistral's templates take."""

    def short(id_: Any) -> str:
        return hashlib.blake2b(str(id_).encode(), digest_size=8).hexdigest()[:9]

    told = [dict(message) for message in messages]
    for message in told:
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])
        if "tool_calls" in message:
            message["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in message["tool_calls"]]
    return told


def teach(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: an instruction in front, calls and results as text."""
    told: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        text = _as_text(message)
        result = message["role"] == "tool"
        if told and told[-1]["role"] == text["role"] == "user" and (result or after_result):
            # such templates often insist that turns alternate
            told[-1]["content"] = f"{told[-1]['content']}\n{text['content']}"
        else:
            told.append(text)
        after_result = result
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instruction = _INSTRUCTION.format(tools=listed)
    if told and told[0]["role"] == "system":
        told[0] = {**told[0], "content": f"{told[0]['content']}\n\n{instruction}".strip()}
        return told
    return [{"role": "system", "content": instruction}, *told]


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    values = dict(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in values.pop("tool_calls", ())]
    text = [values["content"]] if values.get("content") else []
    values["content"] = "\n".join([*text, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])
    return values
