"""The bodies of Ollama's /api/chat and /api/generate: types, bounds, and the way to an ``Ask``.

Owns: pydantic models of the honoured fields and options, the conversation as a chat template wants it.
Does not own: which fields are honoured at all (``fields``), printing (``ollama_dialect``), vectors (``embed``).
Invariant: nothing that shapes an answer is taken and left out; what is left out stands in ``dropped``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import fields
from mlx_cluster.gateway.ask import MAX_MESSAGES, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS, Ask, Tool, ToolUse
from mlx_cluster.gateway.body import Body
from mlx_cluster.gateway.chat_tools import MAX_CALLS, MAX_TOOLS, ToolName
from mlx_cluster.gateway.formats import ANY_OBJECT, effort_values
from mlx_cluster.gateway.schemas import SEED_MASK, json_object, validated
from mlx_cluster.request import Grammar, Sampling

MAX_STOPS = 16
LATEST = ":latest"


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Options(Body):
    """What shapes an answer, with Ollama's own defaults."""

    num_predict: Annotated[int, Field(ge=-2, lt=1 << 31)] = -1
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] = 40
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.9
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        BeforeValidator(_strings),
        Field(max_length=MAX_STOPS),
    ] = Field(default=[])
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0

    def sampling(self, top_logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k, 0) if self.top_p else 1,
            min_p=self.min_p,
            seed=self.seed & SEED_MASK,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repeat_penalty,
            top_logprobs=top_logprobs,
        )


class Called(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] = Field(default={})
    index: int | None = None


class ToolCall(Body):
    function: Called
    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"


class Message(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    thinking: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None


class Function(Body):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"] = "function"
    function: Function


class Common(Body):
    """What both routes have."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool = True
    format: Literal["json", ""] | dict[str, Any] = ""
    options: dict[str, Any] = Field(default={})
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0

    def common(self, dropped: list[str]) -> dict[str, Any]:
        """The part of an ``Ask`` that does not depend on the route; what is without effect goes to ``dropped``."""
        vain: list[str] = []
        try:
            options = validated(Options, fields.honoured(self.options, fields.OLLAMA_OPTIONS, vain))
        except InvalidRequest as error:
            raise InvalidRequest(f"options.{error}", param=f"options.{error.param}", code=error.code) from None
        dropped += [f"options.{name}" for name in vain]
        return {
            "model": self.model.removesuffix(LATEST),
            "sampling": options.sampling(self.top_logprobs if self.logprobs else None),
            "seed_given": options.seed != 0,
            "max_tokens": options.num_predict if options.num_predict > 0 else None,
            "max_tokens_is_ceiling": True,
            "max_tokens_field": "options.num_predict",
            "stop": tuple(options.stop),
            "stream": self.stream,
            "grammar": self._grammar(),
            "grammar_field": "format",
            "template_values": self._template_values(),
            "hints": () if self.think is None else ("think",),
            "splits_reasoning": True,
        }

    def _grammar(self) -> Grammar | None:
        if isinstance(self.format, dict):
            return Grammar("json_schema", json.dumps(self.format, ensure_ascii=False))
        return ANY_OBJECT if self.format == "json" else None

    def _template_values(self) -> dict[str, Any]:
        if self.think is None or isinstance(self.think, bool):
            return {} if self.think is None else {"enable_thinking": self.think, "thinking": self.think}
        return effort_values(self.think)


class ChatBody(Common):
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] = Field(default=[])
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = Field(default=[])

    def to_ask(self, dropped: list[str]) -> Ask | None:
        """None for a conversation without messages, which asks to load the model."""
        if not self.messages:
            return None
        tools = tuple(
            Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {})
            for tool in self.tools
        )
        if len({tool.name for tool in tools}) < len(tools):
            raise InvalidRequest("tools: two tools have the same name: rename one", param="tools", code="invalid_value")
        return Ask(
            **self.common(dropped),
            messages=tuple(_conversation(self.messages)),
            continues=self.messages[-1].role == "assistant" and bool(self.messages[-1].content),
            tool_use=ToolUse(tools) if tools else None,
        )


class GenerateBody(Common):
    prompt: str = ""
    suffix: str = ""
    system: str = ""
    raw: bool = False

    def to_ask(self, dropped: list[str]) -> Ask | None:
        """None without a prompt, which asks to load the model."""
        if not self.prompt:
            return None
        if self.raw or self.suffix:
            if self.system:
                raise InvalidRequest("system has no place in a raw prompt: leave one out", param="system")
            return Ask(
                **self.common(dropped), prompts=(self.prompt,), suffix=self.suffix or None, prompt_field="prompt"
            )
        before = [{"role": "system", "content": self.system}] if self.system else []
        messages = (*before, {"role": "user", "content": self.prompt})
        return Ask(**self.common(dropped), messages=messages, prompt_field="prompt")


def _conversation(messages: list[Message]) -> Iterator[dict[str, Any]]:
    """Messages as chat templates know them. Calls have no ids in this dialect: results follow them in their order."""
    waiting: list[tuple[str, str]] = []  # (name, id) of calls without a result
    count = 0
    for message in messages:
        values: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            values["reasoning_content"] = message.thinking
        if message.tool_calls:
            values["tool_calls"] = []
            for call in message.tool_calls:
                id_ = call.id or f"call_{count}"
                count += 1
                waiting.append((call.function.name, id_))
                function = {"name": call.function.name, "arguments": call.function.arguments}
                values["tool_calls"].append({"id": id_, "type": "function", "function": function})
        if message.role == "tool":
            mine = next((call for call in waiting if call[0] == message.tool_name), None)
            mine = mine or (waiting[0] if waiting else ("", "call_0"))
            if mine in waiting:
                waiting.remove(mine)
            values["tool_call_id"] = message.tool_call_id or mine[1]
            if message.tool_name:
                values["name"] = message.tool_name
        yield values


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request, or none where only the model is to be loaded; and the names of what is without effect."""

    body: ChatBody | GenerateBody
    ask: Ask | None
    dropped: tuple[str, ...]


def parse_chat(raw: bytes) -> Parsed:
    """The body of POST /api/chat. Raises ``InvalidRequest``."""
    dropped: list[str] = []
    body = validated(ChatBody, fields.honoured(json_object(raw), fields.OLLAMA_CHAT, dropped))
    return Parsed(body, body.to_ask(dropped), tuple(dropped))


def parse_generate(raw: bytes) -> Parsed:
    """The body of POST /api/generate. Raises ``InvalidRequest``."""
    dropped: list[str] = []
    body = validated(GenerateBody, fields.honoured(json_object(raw), fields.OLLAMA_GENERATE, dropped))
    return Parsed(body, body.to_ask(dropped), tuple(dropped))
