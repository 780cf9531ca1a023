"""The bodies of /v1/messages and /v1/messages/count_tokens: Anthropic's types, bounds, and the way to an ``Ask``.

Owns: pydantic models of the honoured fields and blocks, and the conversation as a chat template wants it.
Does not own: which fields are honoured at all (``fields``), printing (``messages_dialect``).
Invariant: what a client's history holds reaches the template in its order, or the request is refused by name.
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
from mlx_cluster.gateway.ask import MAX_MESSAGES, MAX_STOP_LENGTH, Ask, AskedPriority
from mlx_cluster.gateway.formats import Effort, effort_values
from mlx_cluster.gateway.messages_tools import MAX_TOOLS, AnyTool, ToolChoice, dropped_tools, tool_use
from mlx_cluster.gateway.schemas import Body, SamplingBody, json_object, validated
from mlx_cluster.request import Grammar, Sampling

MAX_STOP_SEQUENCES = 16
# Claude Code puts a line of accounting, new for each request, at the very front of its system prompt: left there, no
# two requests would share a prefix.
BILLING_LINE = "x-anthropic-billing-header:"
# Parts of one turn that came as blocks of their own: a template knows one text.
BETWEEN_BLOCKS = "\n\n"

_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


def _blocks(value: Any) -> Any:
    """A plain string is one text block; a block of a kind that cannot be read is named."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content", "should be a string or a list of content blocks")
    for index, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in _BLOCKS:
            raise PydanticCustomError(
                "unsupported",
                "has a block of type {kind} at [{index}], and this server reads {known} only",
                {"kind": repr(kind[:64]), "index": index, "known": ", ".join(_BLOCKS)},
            )
    return value


class Block(Body):
    cache_control: Any = None  # advisory: prefixes are cached by themselves


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Any = None  # of earlier answers; they point into documents, which are not read here


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]
    caller: Any = None
    toolset_name: str | None = None


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)]
    content: Annotated[list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])] = Field(
        default=[]
    )
    is_error: bool = False
    toolset_name: str | None = None

    @property
    def text(self) -> str:
        text = "\n".join(block.text for block in self.content)
        return f"Error: {text}" if self.is_error else text


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block):
    """Another service's sealed reasoning: nothing can be read from it."""

    type: Literal["redacted_thinking"]
    data: str


AnyBlock = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]
SystemText = Annotated[list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[AnyBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[AnyBlock])]

    @property
    def text(self) -> str:
        return "".join(block.text for block in self.content if isinstance(block, TextBlock))

    def for_template(self) -> Iterator[dict[str, Any]]:
        """The one or more messages that a chat template makes of this turn."""
        if self.role == "assistant":
            yield self._answer()
            return
        texts: list[str] = []
        for block in self.content:
            match block:
                case TextBlock():
                    texts.append(block.text)
                case ToolResultBlock() if self.role == "user":
                    if texts:
                        yield {"role": self.role, "content": BETWEEN_BLOCKS.join(texts)}
                        texts = []
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
                case _:
                    raise InvalidRequest(
                        f"messages: a {block.type} block stands in a turn of the {self.role}: move it to its own turn",
                        param="messages",
                        code="invalid_value",
                    )
        if texts or not self.content:
            yield {"role": self.role, "content": BETWEEN_BLOCKS.join(texts)}

    def _answer(self) -> dict[str, Any]:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for block in self.content:
            match block:
                case TextBlock():
                    texts.append(block.text)
                case ThinkingBlock():
                    thoughts.append(block.thinking)
                case ToolUseBlock():
                    function = {"name": block.name, "arguments": block.input}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ToolResultBlock():
                    raise InvalidRequest(
                        "messages: a tool_result block stands in a turn of the assistant: move it to the user's",
                        param="messages",
                        code="invalid_value",
                    )
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return message


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]

    def grammar(self) -> Grammar:
        return Grammar("json_schema", json.dumps(self.schema_))


class OutputConfig(Body):
    effort: Effort | None = None
    task_budget: Any = None  # dropped, and named
    format: JsonFormat | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None  # dropped, and named
    display: str | None = None  # dropped, and named


class MessagesBody(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: SystemText = Field(default=[])
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOP_SEQUENCES)
    ] = Field(default=[])
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    output_config: OutputConfig = OutputConfig()
    thinking: Thinking | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] = Field(default=[])
    tool_choice: ToolChoice | None = None
    priority: AskedPriority | None = None
    speculation: bool | None = None

    def check(self) -> None:
        """What only matters when there is to be an answer."""
        if self.max_tokens is None:
            raise InvalidRequest(
                "max_tokens is required: add it", param="max_tokens", code="missing_required_parameter"
            )
        last = self.messages[-1]
        if last.role != "assistant":
            return
        if any(not isinstance(block, TextBlock) for block in last.content) or not last.text.strip():
            raise InvalidRequest(
                "messages ends with a turn of the assistant that is not text alone: only text can be continued",
                param="messages",
                code="invalid_value",
            )
        if last.text != last.text.rstrip():
            raise InvalidRequest(
                "messages ends with a turn of the assistant that ends with whitespace: the next token brings its own",
                param="messages",
                code="invalid_value",
            )

    def to_ask(self) -> Ask:
        return Ask(
            model=self.model,
            sampling=self._sampling(),
            messages=tuple(self._conversation()),
            continues=self.messages[-1].role == "assistant" and bool(self.messages[-1].text),
            max_tokens=self.max_tokens,
            # Clients of this dialect ask for the most that a hosted model gives, whatever the context of this one.
            max_tokens_is_ceiling=True,
            stop=tuple(self.stop_sequences),
            stream=self.stream,
            template_values=self._template_values(),
            hints=self._hints(),
            splits_reasoning=True,
            tool_use=tool_use(self.tools, self.tool_choice),
            grammar=self._grammar(),
            grammar_field="output_config.format",
            priority=self.priority,
            speculate=self.speculation,
        )

    def dropped(self) -> list[str]:
        """What was asked for in vain inside of honoured fields."""
        names = ["output_config.task_budget"] if self.output_config.task_budget else []
        if self.thinking is not None:
            names += [f"thinking.{name}" for name in ("budget_tokens", "display") if getattr(self.thinking, name)]
        return names + dropped_tools(self.tools)

    def _hints(self) -> tuple[str, ...]:
        asked = {"output_config.effort": self.output_config.effort, "thinking": self.thinking}
        return tuple(name for name, value in asked.items() if value is not None)

    def _template_values(self) -> dict[str, Any]:
        values = effort_values(self.output_config.effort)
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            values |= {"enable_thinking": thinks, "thinking": thinks}
        return values

    def _grammar(self) -> Grammar | None:
        return self.output_config.format.grammar() if self.output_config.format is not None else None

    def _sampling(self) -> Sampling:
        body = SamplingBody(model=self.model, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        return body.sampling(None)

    def _conversation(self) -> Iterator[dict[str, Any]]:
        system = system_text(self.system)
        if system:
            yield {"role": "system", "content": system}
        waiting: dict[str, Any] | None = None
        for turn in self.messages:
            for message in turn.for_template():
                # Anthropic takes turns of one role in a row as one; most templates insist on it.
                if waiting is not None and waiting["role"] == message["role"] == "user":
                    waiting["content"] += BETWEEN_BLOCKS + message["content"]
                    continue
                if waiting is not None:
                    yield waiting
                waiting = message
        if waiting is not None:
            yield waiting


def system_text(blocks: Sequence[TextBlock]) -> str:
    """The system prompt, without the line of accounting that would make every prompt a new one."""
    texts = [block.text for block in blocks]
    if texts and texts[0].startswith(BILLING_LINE):
        texts[0] = texts[0].partition("\n")[2].lstrip("\n")
    return BETWEEN_BLOCKS.join(text for text in texts if text)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request, and the names of what it asked for in vain."""

    ask: Ask
    dropped: tuple[str, ...]


def parse_messages(raw: bytes) -> Parsed:
    """The body of POST /v1/messages. Raises ``InvalidRequest``."""
    body, dropped = _body(raw)
    body.check()
    return Parsed(body.to_ask(), dropped)


def parse_count(raw: bytes) -> Parsed:
    """The body of POST /v1/messages/count_tokens: no ``max_tokens``, and any turn may be the last."""
    body, dropped = _body(raw)
    return Parsed(body.to_ask(), dropped)


def _body(raw: bytes) -> tuple[MessagesBody, tuple[str, ...]]:
    dropped: list[str] = []
    values = fields.honoured(json_object(raw), fields.MESSAGES, dropped)
    body = validated(MessagesBody, values)
    return body, (*dropped, *body.dropped())
