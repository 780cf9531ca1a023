"""The bodies of /v1/chat/completions and /v1/completions: types, bounds, and the way to an ``Ask``.

Owns: pydantic models of the honoured fields and the wording of what is wrong with them.
Does not own: which fields are honoured at all (``fields``), the prompt's length and its ids (``session``).
Invariant: nothing is coerced; every complaint names the field, the value and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import fields
from mlx_cluster.gateway.ask import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_SEQUENCES,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    Ask,
    AskedPriority,
)
from mlx_cluster.gateway.body import Body as Body  # the other dialects look for it here
from mlx_cluster.gateway.chat_tools import MAX_CALLS, MAX_TOOLS, FunctionTool, ToolCall, ToolChoice, tool_use
from mlx_cluster.gateway.formats import Effort, ResponseFormat, Structured, grammar_of, template_values
from mlx_cluster.request import Sampling

SEED_MASK = (1 << 63) - 1
# What OpenAI's /v1/completions does when max_tokens is left out; clients of that route count on it.
COMPLETION_DEFAULT_MAX_TOKENS = 16


def _strings(value: Any) -> Any:
    """One stop string is a list of one."""
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """A plain string is a list of one text part."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("content", "should be a string or a list of text parts")


def _only_empty(value: Any) -> Any:
    if value is None or value == []:
        return None
    raise PydanticCustomError("unsupported", "is not supported yet: leave it out, or send it empty")


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Empty = Annotated[Any, AfterValidator(_only_empty)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation. What answers carry along empty (``refusal``, ``tool_calls``) may come back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None, BeforeValidator(_parts, json_schema_input_type=str | list[TextPart] | None)
    ] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: Empty = None
    audio: Empty = None
    function_call: Empty = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    annotations: Empty = None

    def for_template(self) -> dict[str, Any]:
        # Chat templates know "system"; "developer" is OpenAI's later word for the same role.
        values: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content or ()),
        }
        if self.name is not None:
            values["name"] = self.name
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        if reasoning is not None:
            values["reasoning_content"] = reasoning
        if self.tool_calls:
            values["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            values["tool_call_id"] = self.tool_call_id
        return values

    def check(self, path: str) -> None:
        """Raise ``InvalidRequest`` for what only another role may carry."""
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise InvalidRequest(
                    f"{path}.{name} belongs into a message of the role {role!r}, not {self.role!r}",
                    param=f"{path}.{name}",
                    code="invalid_value",
                )


class SamplingBody(Structured):
    """What both routes have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    stop: Annotated[
        list[StopString],
        BeforeValidator(_strings, json_schema_input_type=StopString | list[StopString]),
        Field(max_length=MAX_STOPS),
    ] = Field(default=[])
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    ignore_eos: bool = False
    priority: AskedPriority | None = None
    speculation: bool | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_LOGIT_BIAS),
    ] = Field(default={})

    def sampling(self, top_logprobs: int | None) -> Sampling:
        top_p, top_k = self.top_p, max(self.top_k, 0)
        if top_p == 0:
            # "The tokens that make up the first 0 % of the mass": by the clients' understanding, the most likely one.
            top_p, top_k = 1.0, 1
        return Sampling(
            temperature=self.temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=self.min_p,
            # A seed keeps its lower 63 bits: the engine's are unsigned, OpenAI's signed.
            seed=(self.seed or 0) & SEED_MASK,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(sorted((int(key), value) for key, value in self.logit_bias.items())),
            top_logprobs=top_logprobs,
        )

    def common(self) -> dict[str, Any]:
        """The part of an ``Ask`` that does not depend on the route."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is only allowed with stream: true; set that or leave stream_options out",
                param="stream_options",
            )
        continuous = options is not None and bool(options.continuous_usage_stats)
        return {
            "model": self.model,
            "seed_given": self.seed is not None,
            "num_choices": self.n,
            "stop": tuple(self.stop),
            "ignore_eos": self.ignore_eos,
            "priority": self.priority,
            "speculate": self.speculation,
            "stream": self.stream,
            "include_usage": continuous or (options is not None and bool(options.include_usage)),
            "continuous_usage": continuous,
        }


class ChatBody(SamplingBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = Field(default=[])
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] = Field(default={})

    def to_ask(self) -> Ask:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs is {self.top_logprobs}, but logprobs is not true: set logprobs: true as well",
                param="top_logprobs",
            )
        for index, message in enumerate(self.messages):
            message.check(f"messages[{index}]")
        grammar, grammar_field = grammar_of(self, self.response_format)
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequest(
                f"max_tokens is {old}, max_completion_tokens is {new}: they mean the same, send one of them",
                param="max_tokens",
            )
        return Ask(
            **self.common(),
            sampling=self.sampling((self.top_logprobs or 0) if self.logprobs else None),
            messages=tuple(message.for_template() for message in self.messages),
            max_tokens=new if new is not None else old,
            prompt_field="messages",
            max_tokens_field="max_completion_tokens" if new is not None else "max_tokens",
            template_values=template_values(self.reasoning_effort, self.chat_template_kwargs),
            hints=tuple(name for name in ("reasoning_effort", "chat_template_kwargs") if getattr(self, name)),
            tool_use=tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls),
            grammar=grammar,
            grammar_field=grammar_field,
            splits_reasoning=True,
        )


class CompletionBody(SamplingBody):
    prompt: Any
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool = False
    suffix: str | None = None

    def to_ask(self) -> Ask:
        prompts = _prompts(self.prompt)
        self._check(len(prompts))
        grammar, grammar_field = grammar_of(self)
        return Ask(
            **self.common(),
            sampling=self.sampling(self.logprobs),
            prompts=prompts,
            suffix=self.suffix or None,
            echo=self.echo,
            echo_only=self.max_tokens == 0,
            best_of=self.best_of,
            # An engine always draws one token more than it computes; the one of an echo alone is not shown.
            max_tokens=max(self.max_tokens, 1) if self.max_tokens is not None else COMPLETION_DEFAULT_MAX_TOKENS,
            prompt_field="prompt",
            grammar=grammar,
            grammar_field=grammar_field,
        )

    def _check(self, num_prompts: int) -> None:
        """What no single field can tell."""
        best_of = self.best_of if self.best_of is not None else self.n
        if best_of < self.n:
            raise _conflict(f"best_of is {best_of}, n is {self.n}: of so few not so many can be the best", "best_of")
        if best_of > self.n and self.stream:
            raise _conflict(
                "best_of above n cannot be streamed: the best is known at the end; leave one out", "best_of"
            )
        if num_prompts * best_of > MAX_SEQUENCES:
            raise _conflict(
                f"{num_prompts} prompts with {best_of} choices each are more than {MAX_SEQUENCES}: send fewer",
                "prompt",
            )
        if self.max_tokens == 0 and not self.echo:
            raise _conflict("max_tokens is 0: it must be at least 1 where the prompt is not echoed", "max_tokens")
        if self.echo and self.suffix:
            raise _conflict("echo and suffix exclude each other: leave one out", "suffix")


def _conflict(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")


def _prompts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    """The prompts of a completion: one text, one list of token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > MAX_SEQUENCES:
            raise _conflict(f"prompt is a batch of {len(prompt)}: send at most {MAX_SEQUENCES}", "prompt")
        return tuple(_single_prompt(one, f"prompt[{index}]") for index, one in enumerate(prompt))
    return (_single_prompt(prompt, "prompt"),)


def _single_prompt(prompt: Any, param: str) -> str | tuple[int, ...]:
    if prompt in ("", []):
        raise _conflict(f"{param} is empty: send at least one token", param)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(value) is int and value >= 0 for value in prompt):
        return tuple(prompt)
    raise _conflict(
        f"{param} is {_shown(prompt)}: it should be a string or a list of token ids (integers from 0)", param
    )


def parse_chat(raw: bytes) -> Ask:
    """The body of POST /v1/chat/completions. Raises ``InvalidRequest``."""
    return validated(ChatBody, fields.honoured(json_object(raw), fields.CHAT)).to_ask()


def parse_completion(raw: bytes) -> Ask:
    """The body of POST /v1/completions. Raises ``InvalidRequest``."""
    return validated(CompletionBody, fields.honoured(json_object(raw), fields.COMPLETION)).to_ask()


def json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"the body is a JSON {_json_type(value)}, not an object: send {{...}}", code="invalid_json"
        )
    return value


BodyT = TypeVar("BodyT", bound=Body)


def validated(kind: type[BodyT], values: Mapping[str, Any]) -> BodyT:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _complaint(error.errors(include_url=False)[0], values) from None


# pydantic's words where they would puzzle somebody who only knows the HTTP API. {…} are pydantic's own context.
_WORDING = {
    "too_short": "needs at least {min_length} entries",
    "too_long": "may have at most {max_length} entries",
    "string_too_short": "must not be empty",
    "string_too_long": "may have at most {max_length} characters",
    "string_pattern_mismatch": "should be a token id, an integer from 0",
    "model_type": "should be an object",
    "list_type": "should be a list",
    "dict_type": "should be an object",
    "string_type": "should be a string",
    "int_type": "should be an integer",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
}


def _complaint(detail: ErrorDetails, values: Mapping[str, Any]) -> InvalidRequest:
    path = _path(detail["loc"], values, missing=detail["type"] == "missing")
    if detail["type"] == "missing":
        return InvalidRequest(f"{path} is required: add it", param=path, code="missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {path}: leave it out", param=path, code="unknown_parameter")
    code = "unsupported_parameter" if detail["type"] == "unsupported" else "invalid_value"
    wording = _WORDING.get(detail["type"])
    reason = wording.format(**detail.get("ctx", {})) if wording else detail["msg"].removeprefix("Input ")
    return InvalidRequest(f"{path} is {_shown(detail['input'])}: it {reason}", param=path, code=code)


def _path(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> str:
    """``("messages", 0, "content")`` → ``messages[0].content``.

    pydantic's paths also name what is not the client's: the tags of unions, ``[key]``, places in lists that we made. A
    step counts when it leads on in what the client sent, or is the field that is missing there.
    """
    path, node = "", values
    for last, step in ((index == len(loc) - 1, step) for index, step in enumerate(loc)):
        if isinstance(node, Mapping) and (step in node or (missing and last)):
            node = node.get(step) if isinstance(step, str) else None
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            node = node[step]
        else:
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")[:128]


def _shown(value: Any) -> str:
    """A value as the client wrote it, cut short."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of very many digits"
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # such a number is somewhere inside
        return f"this {_json_type(value)}"
    return text if len(text) <= 64 else f"{text[:60]}…"


def _json_type(value: Any) -> str:
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
