"""How Ollama's /api/chat and /api/generate print an answer: one object, or one object a line.

Owns: their objects, durations in nanoseconds, log probabilities in their form, errors in their form.
Does not own: when they are sent (``answer``).
Invariant: a line is a whole object; the last one has ``done`` or ``error``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json

from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.errors import error_body
from mlx_cluster.gateway.openai import LOWEST_LOGPROB, Answered, Head
from mlx_cluster.gateway.parts import CallArguments, CallEnd, CallStart, Thought
from mlx_cluster.gateway.session import ChoiceEnd, Delta, PartDelta, Usage
from mlx_cluster.tokenizer import Tokenizer

PREFIX = "/api/"
CONTENT_TYPE = b"application/x-ndjson"


def asked(scope: Mapping[str, Any]) -> bool:
    """Whether who asks speaks this dialect: it has its paths for itself."""
    return str(scope["path"]).startswith(PREFIX)


def error_bytes(error: BaseException, request_id: str) -> bytes:
    """Its errors are a message, and nothing else."""
    return json.dumps({"error": error_body(error, request_id)["error"]["message"]}, ensure_ascii=False).encode()


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaDialect:
    """``name`` is the model as the client called it; ``started_ns`` when it asked, by the monotonic clock."""

    def __init__(self, head: Head, tokenizer: Tokenizer, name: str, *, chat: bool, started_ns: int) -> None:
        self._head, self._tokenizer, self._name, self._chat = head, tokenizer, name, chat
        self._started_ns = started_ns
        self._reason = "length"
        self._num_calls = 0
        self._called = ""
        self._arguments: list[str] = []

    def start(self, num_choices: int) -> bytes:
        return b""

    def delta(self, event: Delta) -> bytes:
        more = {"logprobs": self._logprobs([event.piece])} if self._head.with_logprobs else {}
        return _line({**self._said(content=event.piece.text), **more, "done": False})

    def part(self, event: PartDelta) -> bytes:
        match event.part:
            case Thought(text):
                return _line({**self._said(thinking=text), "done": False}) if text else b""
            case CallStart(_, _, name):
                self._called, self._arguments = name, []
            case CallArguments(_, text):
                self._arguments.append(text)
            case CallEnd():
                call = self._call(self._called, "".join(self._arguments))
                return _line({**self._said(tool_calls=[call]), "done": False})
        return b""

    def choice_end(self, event: ChoiceEnd) -> bytes:
        self._reason = event.reason
        return b""

    def alive(self) -> bytes:
        return _line({**self._said(), "done": False})  # its clients read every line as an object

    def end(self, usage: Usage) -> bytes:
        return _line({**self._said(), **self._done(usage)})

    def failure(self, error: Exception, request_id: str) -> bytes:
        return error_bytes(error, request_id) + b"\n"

    def whole(self, choices: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        answered = choices[0]
        self._reason = answered.reason
        calls = [self._call(call.name, call.arguments) for call in answered.calls]
        more = {"logprobs": self._logprobs(answered.pieces)} if self._head.with_logprobs else {}
        said = self._said(content=answered.text, thinking=answered.reasoning, tool_calls=calls)
        return {**said, **more, **self._done(usage)}

    def _said(
        self, content: str = "", thinking: str = "", tool_calls: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        head: dict[str, Any] = {"model": self._name, "created_at": now()}
        more: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if tool_calls:
            more["tool_calls"] = list(tool_calls)
        if not self._chat:
            return {**head, "response": content, **more}
        return {**head, "message": {"role": "assistant", "content": content, **more}}

    def _done(self, usage: Usage) -> dict[str, Any]:
        total = time.monotonic_ns() - self._started_ns
        first = min(total, int((usage.first_token_seconds or 0.0) * 1e9))
        return {
            "done": True,
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": total,
            "load_duration": 0,  # what is served is loaded
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": first,
            "eval_count": usage.completion_tokens,
            "eval_duration": total - first,
        }

    def _call(self, name: str, arguments: str) -> dict[str, Any]:
        """One call; arguments that the length limit cut off come as far as they go."""
        try:
            found = from_json(arguments or "{}", allow_partial=True)
        except ValueError:
            found = {}
        function = {"index": self._num_calls, "name": name, "arguments": found if isinstance(found, dict) else {}}
        self._num_calls += 1
        return {"function": function}

    def _logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            {
                **self._entry(piece.token.token_id, piece.token.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in piece.token.top],
            }
            for piece in pieces
            if piece.token is not None
        ]

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB) if logprob is not None else LOWEST_LOGPROB,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
