"""The parts of an answer, the same for every dialect: text, reasoning and tool calls, as they come.

Owns: the closed union ``Part`` and the values that a whole answer is folded into.
Does not own: how a model marks them (``tokenizer.reasoning``, ``tokenizer.tools``), finding them (``splitter``), how a
dialect prints them.
Invariant: per choice, parts come in the order in which the model wrote them; a call is one ``CallStart``, any number
of ``CallArguments`` whose texts together are one JSON object, one ``CallEnd``, with nothing of another call between.

How a dialect meets them. A session yields ``session.Delta`` for text (``delta.piece`` is a ``choice.Piece``) and
``session.PartDelta`` for everything else (``part`` is a ``Thought``, ``CallStart``, ``CallArguments`` or
``CallEnd``); ``session.ChoiceEnd.reason`` is "tool_calls" when the choice ended with at least one call. A dialect
prints the first by ``delta``, the second by ``part``. An answer that is not streamed is ``openai.Answered``: its
``text``, ``reasoning`` and ``calls`` are whole, and ``parts`` has their order. A call that was cut off by the length
limit has no ``CallEnd``.

What a dialect asks for. ``Ask.tool_use`` (``ask.ToolUse`` of ``ask.Tool``) offers tools, ``choice="required"`` binds
the answer to calls of them (``only``: of that one); ``Ask.grammar`` binds its text; ``Ask.splits_reasoning`` turns
reasoning into ``Thought`` (left out, it stays text). In ``Ask.messages`` an earlier call is ``{"role": "assistant",
"content": …, "tool_calls": [{"id", "type": "function", "function": {"name", "arguments": an object}}]}``, its result
``{"role": "tool", "tool_call_id", "content"}``, and earlier reasoning ``reasoning_content``; ``prepare`` renders them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_cluster.gateway.choice import Piece
from mlx_cluster.request import Token


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning text, and the token it came from."""

    text: str
    token: Token | None = None


@dataclass(frozen=True, slots=True)
class CallStart:
    """The model calls a tool. ``call`` counts the calls of this choice from 0; ``id`` is minted here."""

    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call ``call``, as JSON text."""

    call: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    call: int


Marked = Thought | CallStart | CallArguments | CallEnd
Part = Piece | Marked


@dataclass(frozen=True, slots=True)
class Call:
    """One whole tool call. ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


def text_of(parts: Iterable[Part]) -> str:
    """The answer's text without reasoning and calls."""
    return "".join(part.text for part in parts if isinstance(part, Piece))


def reasoning_of(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Thought))


def calls_of(parts: Sequence[Part]) -> list[Call]:
    """The tool calls, each whole (or as far as it came)."""
    arguments: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallArguments):
            arguments.setdefault(part.call, []).append(part.text)
    return [
        Call(part.id, part.name, "".join(arguments.get(part.call, ()))) for part in parts if isinstance(part, CallStart)
    ]
