"""How the two OpenAI routes print an answer: whole, or as chunks of a stream.

Owns: the objects ``chat.completion[.chunk]`` and ``text_completion``, log probabilities and usage in their form.
Does not own: when they are sent (``answer``), errors (``errors``).
Invariant: one event per piece; what is the same in all chunks of a stream is encoded once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx_cluster
from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.echo import Echoed
from mlx_cluster.gateway.errors import error_bytes
from mlx_cluster.gateway.parts import (
    Call,
    CallArguments,
    CallEnd,
    CallStart,
    Marked,
    Part,
    Thought,
    calls_of,
    reasoning_of,
    text_of,
)
from mlx_cluster.gateway.session import ChoiceEnd, Delta, PartDelta, Usage
from mlx_cluster.gateway.sse import DONE, KEEP_ALIVE
from mlx_cluster.request import Token
from mlx_cluster.tokenizer import Tokenizer

# JSON knows no infinity; OpenAI prints this for a token that cannot be drawn.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One finished choice of an answer that is not streamed."""

    index: int
    parts: Sequence[Part]
    reason: str
    stop_string: str | None = None
    echoed: Echoed | None = None

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of the text, without reasoning and calls."""
        return [part for part in self.parts if isinstance(part, Piece)]

    @property
    def text(self) -> str:
        return text_of(self.parts)

    @property
    def reasoning(self) -> str:
        return reasoning_of(self.parts)

    @property
    def calls(self) -> list[Call]:
        return calls_of(self.parts)


def best(choices: Sequence[Answered], num_drawn: int, num_kept: int) -> list[Answered]:
    """Of each prompt's ``num_drawn`` choices the ``num_kept`` whose tokens are the most likely on average, numbered."""
    if num_kept == num_drawn:
        return list(choices)
    kept: list[Answered] = []
    for at in range(0, len(choices), num_drawn):
        ranked = sorted(choices[at : at + num_drawn], key=_mean_logprob, reverse=True)
        kept += ranked[:num_kept]
    return [replace(choice, index=index) for index, choice in enumerate(kept)]


def _mean_logprob(choice: Answered) -> float:
    logprobs = [_finite(token.logprob) for token in _tokens(choice.pieces)]
    return sum(logprobs) / len(logprobs) if logprobs else LOWEST_LOGPROB


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    continuous_usage: bool = False
    with_logprobs: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    max_tokens: int = 0  # what the engine was asked for

    @property
    def system_fingerprint(self) -> str:
        """Changes when the same seed may give another answer: with the model and with this program."""
        return f"fp_{hashlib.sha256(f'{self.model}/{mlx_cluster.__version__}'.encode()).hexdigest()[:10]}"


class Dialect(Protocol):
    """Prints one answer. Chunks are complete SSE events; ``end`` or ``failure`` gives a stream's last ones."""

    def start(self, num_choices: int) -> bytes: ...
    def delta(self, event: Delta) -> bytes: ...
    def part(self, event: PartDelta) -> bytes: ...
    def choice_end(self, event: ChoiceEnd) -> bytes: ...
    def alive(self) -> bytes: ...
    def end(self, usage: Usage) -> bytes: ...
    def failure(self, error: Exception, request_id: str) -> bytes: ...
    def whole(self, choices: Sequence[Answered], usage: Usage) -> dict[str, Any]: ...


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


class _Chunks:
    """A stream's chunks: a head and a tail around ``choices``."""

    def __init__(self, head: Head, object_name: str) -> None:
        self._head = head
        fields = {"id": head.id, "object": object_name, "created": head.created, "model": head.model}
        fields["system_fingerprint"] = head.system_fingerprint
        self._before = f"data: {json.dumps(fields)[:-1]}, "
        self._no_usage = ', "usage": null' if head.include_usage else ""

    def chunk(self, choices: str, completion_tokens: int) -> bytes:
        usage = self._no_usage
        if self._head.continuous_usage:
            prompt = self._head.prompt_tokens
            usage = (
                f', "usage": {{"prompt_tokens": {prompt}, "completion_tokens": {completion_tokens}, '
                f'"total_tokens": {prompt + completion_tokens}}}'
            )
        return f'{self._before}"choices": [{choices}]{usage}}}\n\n'.encode()

    def usage(self, usage: Usage) -> bytes:
        return f'{self._before}"choices": [], "usage": {json.dumps(usage_object(usage))}}}\n\n'.encode()


class _Stream:
    """What both routes' streams share: signs of life, and how they end."""

    def __init__(self, head: Head, tokenizer: Tokenizer, object_name: str) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._chunks = _Chunks(head, object_name)

    def alive(self) -> bytes:
        return KEEP_ALIVE

    def end(self, usage: Usage) -> bytes:
        return (self._chunks.usage(usage) if self._head.include_usage else b"") + DONE

    def failure(self, error: Exception, request_id: str) -> bytes:
        return b"data: " + error_bytes(error, request_id) + b"\n\n" + DONE


class ChatDialect(_Stream):
    """POST /v1/chat/completions."""

    def __init__(self, head: Head, tokenizer: Tokenizer) -> None:
        super().__init__(head, tokenizer, "chat.completion.chunk")

    def start(self, num_choices: int) -> bytes:
        delta = '"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null'
        return b"".join(self._chunks.chunk(f'{{"index": {index}, {delta}}}', 0) for index in range(num_choices))

    def delta(self, event: Delta) -> bytes:
        logprobs = "null"
        if self._head.with_logprobs:
            logprobs = json.dumps({"content": self._entries([event.piece]), "refusal": None})
        return self._chunks.chunk(
            f'{{"index": {event.choice}, "delta": {{"content": {json.dumps(event.piece.text)}}}, '
            f'"logprobs": {logprobs}, "finish_reason": null}}',
            event.completion_tokens,
        )

    def part(self, event: PartDelta) -> bytes:
        delta = _part_delta(event.part)
        if delta is None:
            return b""
        return self._chunks.chunk(
            f'{{"index": {event.choice}, "delta": {json.dumps(delta)}, "logprobs": null, "finish_reason": null}}',
            event.completion_tokens,
        )

    def choice_end(self, event: ChoiceEnd) -> bytes:
        return self._chunks.chunk(
            f'{{"index": {event.choice}, "delta": {{}}, "logprobs": null, "finish_reason": "{event.reason}"}}',
            event.completion_tokens,
        )

    def whole(self, choices: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
            "choices": [
                {
                    "index": choice.index,
                    "message": _message(choice),
                    "logprobs": {"content": self._entries(choice.pieces), "refusal": None}
                    if self._head.with_logprobs
                    else None,
                    "finish_reason": choice.reason,
                }
                for choice in choices
            ],
            "usage": usage_object(usage),
        }

    def _entries(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            {**self._entry(token.token_id, token.logprob), "top_logprobs": [self._entry(*top) for top in token.top]}
            for token in _tokens(pieces)
        ]

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _message(choice: Answered) -> dict[str, Any]:
    """The message of an answer; both names of the reasoning, since clients know one or the other."""
    calls = choice.calls
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if calls else ""), "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = message["reasoning"] = choice.reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _part_delta(part: Marked) -> dict[str, Any] | None:
    """The delta of a chunk, as the SDK adds them up; None where there is nothing to add."""
    match part:
        case Thought(text):
            return {"reasoning_content": text, "reasoning": text} if text else None
        case CallStart(call, id_, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": call, "id": id_, "type": "function", "function": function}]}
        case CallArguments(call, text):
            return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}
        case CallEnd():
            return None


class CompletionDialect(_Stream):
    """POST /v1/completions. Log probabilities are four parallel lists, with offsets into the choice's text."""

    def __init__(self, head: Head, tokenizer: Tokenizer) -> None:
        super().__init__(head, tokenizer, "text_completion")
        self._offsets: dict[int, int] = {}

    def start(self, num_choices: int) -> bytes:
        return b""

    def part(self, event: PartDelta) -> bytes:
        return b""  # a plain prompt's answer is not split

    def delta(self, event: Delta) -> bytes:
        logprobs = "null"
        if self._head.with_logprobs:
            offset = self._offsets.get(event.choice, 0)
            self._offsets[event.choice] = offset + len(event.piece.text)
            logprobs = json.dumps(self._logprobs([event.piece], offset))
        return self._chunks.chunk(
            f'{{"index": {event.choice}, "text": {json.dumps(event.piece.text)}, '
            f'"logprobs": {logprobs}, "finish_reason": null}}',
            event.completion_tokens,
        )

    def echoed(self, event: Echoed) -> bytes:
        """The prompt, in front of its choice."""
        text = self._prompt_text(event)
        self._offsets[event.choice] = len(text)
        logprobs = self._prompt_logprobs(event) if self._head.with_logprobs else None
        return self._chunks.chunk(
            f'{{"index": {event.choice}, "text": {json.dumps(text)}, '
            f'"logprobs": {json.dumps(logprobs)}, "finish_reason": null}}',
            0,
        )

    def choice_end(self, event: ChoiceEnd) -> bytes:
        return self._chunks.chunk(
            f'{{"index": {event.choice}, "text": "", "logprobs": null, "finish_reason": "{event.reason}"}}',
            event.completion_tokens,
        )

    def whole(self, choices: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "object": "text_completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(usage),
        }

    def _choice(self, choice: Answered) -> dict[str, Any]:
        before = "" if choice.echoed is None else self._prompt_text(choice.echoed)
        logprobs: dict[str, Any] | None = None
        if self._head.with_logprobs:
            logprobs = self._logprobs(choice.pieces, len(before))
            if choice.echoed is not None:
                prompt = self._prompt_logprobs(choice.echoed)
                logprobs = {name: prompt[name] + values for name, values in logprobs.items()}
        return {
            "index": choice.index,
            "text": before + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.reason,
        }

    def _prompt_text(self, event: Echoed) -> str:
        decoder = self._tokenizer.decoder()
        return "".join([*(decoder.push(token_id) for token_id in event.prompt), decoder.flush()])

    def _prompt_logprobs(self, event: Echoed) -> dict[str, Any]:
        """The prompt's tokens: null where there is no log probability, as for the first."""
        decoder = self._tokenizer.decoder()
        scored = {token.index: token for token in event.scored}
        offsets: list[int] = []
        offset = 0
        for token_id in event.prompt:
            offsets.append(offset)
            offset += len(decoder.push(token_id))
        tokens = [scored.get(index) for index in range(len(event.prompt))]
        return {
            "tokens": [self._name(token_id) for token_id in event.prompt],
            "token_logprobs": [None if token is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [
                None if token is None else {self._name(token_id): _finite(logprob) for token_id, logprob in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        offsets: list[int] = []
        for piece in pieces:
            if piece.token is not None:
                offsets.append(offset)
            offset += len(piece.text)
        tokens = _tokens(pieces)
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._name(token_id): _finite(logprob) for token_id, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        """The token's text; for part of a character its bytes, as OpenAI writes them, since names are keys here."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _tokens(pieces: Sequence[Piece]) -> list[Token]:
    return [piece.token for piece in pieces if piece.token is not None]


def _finite(logprob: float | None) -> float:
    return max(logprob, LOWEST_LOGPROB) if logprob is not None else LOWEST_LOGPROB
