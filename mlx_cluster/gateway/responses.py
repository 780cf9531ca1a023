"""The body of /v1/responses: types and bounds, and the conversation of its items as a chat template wants it.

Owns: pydantic models of the honoured fields and items, the way from items (stored ones too) to an ``Ask``.
Does not own: which fields are honoured at all (``fields``), the store, printing (``responses_dialect``).
Invariant: what the items hold reaches the template in its order, or the request is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import fields
from mlx_cluster.gateway.ask import MAX_MESSAGES, MAX_TOP_LOGPROBS, Ask, AskedPriority
from mlx_cluster.gateway.formats import Effort, effort_values
from mlx_cluster.gateway.responses_tools import MAX_TOOLS, AnyChoice, AnyTool, dropped_tools, tool_use
from mlx_cluster.gateway.schemas import Body, SamplingBody, json_object, validated
from mlx_cluster.request import Grammar

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
# Texts of one turn that came apart: a template knows one.
BETWEEN_PARTS = "\n\n"

_ITEMS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
)
_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


def _known(value: list[Any], known: Sequence[str], what: str) -> list[Any]:
    for index, entry in enumerate(value):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise PydanticCustomError(
                "unsupported",
                "has {what} of type {kind} at [{index}], and this server reads {known} only",
                {"what": what, "kind": repr(kind[:64]), "index": index, "known": ", ".join(known)},
            )
    return value


def _parts(value: Any) -> Any:
    """A plain string is one text part; a part of a kind that cannot be read is named."""
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if value is None:
        return []
    if not isinstance(value, list):
        raise PydanticCustomError("content", "should be a string or a list of text parts")
    return _known(value, _PARTS, "a part")


def _items(value: Any) -> Any:
    """A plain string is one message of the user; a message may leave out its type."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("items", "should be a string or a list of items")
    typed = [
        {"type": "message", **item} if isinstance(item, dict) and "role" in item and "type" not in item else item
        for item in value
    ]
    return _known(typed, _ITEMS, "an item")


class Part(Body):
    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str = ""
    refusal: str = ""
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


Parts = Annotated[list[Part], BeforeValidator(_parts, json_schema_input_type=str | list[Part] | None)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Item(Body):
    """What any item may carry along from the answer it came from."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    phase: str | None = None


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: Parts = Field(default=[])
    content: Parts = Field(default=[])
    encrypted_content: str | None = None  # another service's: nothing can be read from it


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    namespace: str | None = None
    caller: Any = None


class CustomToolCallItem(Item):
    type: Literal["custom_tool_call"]
    call_id: Name
    name: Name
    input: str
    namespace: str | None = None
    caller: Any = None


class CallOutputItem(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Name
    output: Parts
    caller: Any = None


AnyItem = Annotated[
    MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem | CallOutputItem, Field(discriminator="type")
]
Items = Annotated[list[AnyItem], BeforeValidator(_items, json_schema_input_type=str | list[AnyItem])]


class StreamOptions(Body):
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """``strict`` and the rest say what happens anyway: an answer follows its schema."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar("json_schema", json.dumps({"type": "object"}))
        if self.schema_ is None:
            raise InvalidRequest(
                "text.format.schema is required for json_schema: add it",
                param="text.format.schema",
                code="missing_required_parameter",
            )
        return Grammar("json_schema", json.dumps(self.schema_))


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None  # dropped, and named


class Reasoning(Body):
    effort: Effort | None = None
    summary: Any = None  # dropped, and named
    generate_summary: Any = None  # dropped, and named
    context: Any = None  # dropped, and named
    mode: Any = None  # dropped, and named


class ResponsesBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Annotated[Items, Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool = True
    background: bool = False
    previous_response_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    include: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=32)] = Field(default=[])
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] = Field(default=[])
    tool_choice: AnyChoice = "auto"
    parallel_tool_calls: bool = True
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=MAX_METADATA),
    ] = Field(default={})
    priority: AskedPriority | None = None
    speculation: bool | None = None

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in self.include or self.top_logprobs > 0

    def check(self) -> None:
        """What no single field can tell."""
        if self.background and self.stream:
            raise InvalidRequest(
                "background with stream: true is not supported: leave one out, and retrieve the response by its id",
                param="background",
                code="unsupported_value",
            )
        if self.background and not self.store:
            raise InvalidRequest("background needs store: true: the answer would be kept nowhere", param="background")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is only allowed with stream: true; set that or leave stream_options out",
                param="stream_options",
            )

    def to_ask(self, history: Sequence[AnyItem] = ()) -> Ask:
        """``history`` are the items of the responses before this one."""
        body = SamplingBody(model=self.model, temperature=self.temperature, top_p=self.top_p)
        return Ask(
            model=self.model,
            sampling=body.sampling(self.top_logprobs if self.with_logprobs else None),
            messages=tuple(conversation(self.instructions, [*history, *self.input])),
            max_tokens=self.max_output_tokens,
            prompt_field="input",
            max_tokens_field="max_output_tokens",
            stream=self.stream,
            template_values=effort_values(self.reasoning.effort),
            hints=() if self.reasoning.effort is None else ("reasoning.effort",),
            splits_reasoning=True,
            tool_use=tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls),
            grammar=self.text.format.grammar() if self.text.format is not None else None,
            grammar_field="text.format",
            priority=self.priority,
            speculate=self.speculation,
        )

    def dropped(self) -> list[str]:
        """What was asked for in vain inside of honoured fields."""
        names = [] if self.text.verbosity is None else ["text.verbosity"]
        names += [f"include[{name}]" for name in self.include if name != LOGPROBS]
        vain = ("summary", "generate_summary", "context", "mode")
        names += [f"reasoning.{name}" for name in vain if getattr(self.reasoning, name)]
        return names + dropped_tools(self.tools)


class History(Body):
    """Stored items, on their way back into a conversation."""

    input: Items


def conversation(instructions: str | None, items: Sequence[AnyItem]) -> Iterator[dict[str, Any]]:
    """The messages of a conversation: calls and reasoning are parts of the assistant's message around them."""
    # Many templates know one system message, and only in front.
    head = [instructions] if instructions else []
    answer: dict[str, Any] | None = None
    in_front = True
    for item in items:
        if isinstance(item, MessageItem) and item.role in ("system", "developer") and in_front:
            head.append(_text(item.content))
            continue
        if in_front:
            in_front = False
            yield from _system(head)
        if isinstance(item, CallOutputItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
            if answer is not None:
                yield answer
                answer = None
            yield _said(item)
            continue
        if answer is not None and isinstance(item, MessageItem) and (answer["content"] or "tool_calls" in answer):
            yield answer
            answer = None
        answer = answer if answer is not None else {"role": "assistant", "content": ""}
        _add(item, answer)
    if in_front:
        yield from _system(head)
    if answer is not None:
        yield answer


def _system(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    if texts:
        yield {"role": "system", "content": BETWEEN_PARTS.join(texts)}


def _said(item: MessageItem | CallOutputItem) -> dict[str, Any]:
    if isinstance(item, CallOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    return {"role": "user" if item.role == "user" else "system", "content": _text(item.content)}


def _add(item: AnyItem, answer: dict[str, Any]) -> None:
    """One more item of the assistant's own."""
    match item:
        case MessageItem():
            answer["content"] += "".join(part.text or part.refusal for part in item.content)
        case ReasoningItem():
            text = _text(item.content) or _text(item.summary)
            if text:
                answer["reasoning_content"] = answer.get("reasoning_content", "") + text
        case FunctionCallItem():
            _add_call(answer, item.call_id, item.name, _object(item.arguments))
        case CustomToolCallItem():
            _add_call(answer, item.call_id, item.name, {"input": item.input})


def _object(arguments: str) -> Any:
    """Arguments as templates want them; those that are no JSON object stay the text they are."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _add_call(answer: dict[str, Any], call_id: str, name: str, arguments: Any) -> None:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    answer.setdefault("tool_calls", []).append(call)


def _text(parts: Sequence[Part]) -> str:
    return BETWEEN_PARTS.join(part.text or part.refusal for part in parts)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request, the items as its client sent them, and the names of what it asked for in vain."""

    body: ResponsesBody
    raw_items: list[dict[str, Any]]
    dropped: tuple[str, ...]


def parse_responses(raw: bytes) -> Parsed:
    """The body of POST /v1/responses. Raises ``InvalidRequest``."""
    dropped: list[str] = []
    values = fields.honoured(json_object(raw), fields.RESPONSES, dropped)
    body = validated(ResponsesBody, values)
    body.check()
    return Parsed(body, _items(values["input"]), (*dropped, *body.dropped()))


def ask_after(body: ResponsesBody, items: list[dict[str, Any]]) -> Ask:
    """The ``Ask`` of a request that goes on after stored items."""
    return body.to_ask(validated(History, {"input": items}).input)
