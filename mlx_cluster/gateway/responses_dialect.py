"""How /v1/responses prints an answer: a response object, whole, or as numbered events.

Owns: the object ``response``, the events around its items, their sequence numbers, usage in their form.
Does not own: the items (``responses_output``), when they are sent (``answer``), storing (``responses_routes``).
Invariant: ``response`` is the object as it stands; a stream ends with completed, incomplete or failed, and ``response``
is then what was sent.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from mlx_cluster.errors import Overloaded
from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.errors import error_body
from mlx_cluster.gateway.openai import LOWEST_LOGPROB, Answered, Head
from mlx_cluster.gateway.parts import CallArguments, CallEnd, CallStart, Part, Thought
from mlx_cluster.gateway.responses import ResponsesBody, TextFormat
from mlx_cluster.gateway.responses_output import Output
from mlx_cluster.gateway.responses_tools import HostedTool, custom_names
from mlx_cluster.gateway.session import ChoiceEnd, Delta, PartDelta, Usage
from mlx_cluster.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def response_object(id_: str, created: int, model: str, body: ResponsesBody, status: str) -> dict[str, Any]:
    """A response that has no output yet. Of the tools it lists those that are served."""
    text_format = body.text.format if body.text.format is not None else TextFormat(type="text")
    choice = body.tool_choice
    return {
        "id": id_,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools if not isinstance(tool, HostedTool)],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class ResponsesDialect:
    """POST /v1/responses."""

    def __init__(
        self, head: Head, tokenizer: Tokenizer, body: ResponsesBody, draw_id: Callable[[str], str] | None = None
    ) -> None:
        """``draw_id`` gives ids of items that begin with a prefix; random ones without it."""
        self.response = response_object(head.id, head.created, head.model, body, "in_progress")
        self._head = head
        self._tokenizer = tokenizer
        self._output = Output(draw_id or new_id, custom_names(body.tools))
        self._sequence_number = 0
        self._reason = "length"

    def start(self, num_choices: int) -> bytes:
        return self._state("response.created") + self._state("response.in_progress")

    def delta(self, event: Delta) -> bytes:
        return self._print(self._take(event.piece))

    def part(self, event: PartDelta) -> bytes:
        return self._print(self._take(event.part))

    def choice_end(self, event: ChoiceEnd) -> bytes:
        self._reason = event.reason
        return self._print(self._output.close("incomplete" if event.reason == "length" else "completed"))

    def alive(self) -> bytes:
        # Clients of this route watch over its events, and comments are none: one that they know, and that is true.
        return self._state("response.in_progress")

    def end(self, usage: Usage) -> bytes:
        self._finish(usage)
        return self._state(f"response.{self.response['status']}")

    def failure(self, error: Exception, request_id: str) -> bytes:
        self.failed(error, request_id)
        return self._state("response.failed")

    def failed(self, error: Exception, request_id: str) -> None:
        self._output.close("incomplete")
        self.response = {
            **self.response,
            "status": "failed",
            "output": self._output.items,
            "error": error_object(error, request_id),
        }

    def whole(self, choices: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        answered = choices[0]
        for part in answered.parts:
            self._take(part)
        self._reason = answered.reason
        self._output.close("incomplete" if answered.reason == "length" else "completed")
        self._finish(usage)
        return self.response

    def _take(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Piece():
                logprobs = self._logprobs(part) if self._head.with_logprobs else []
                return self._output.text(part.text, logprobs) if part.text or logprobs else []
            case Thought(text):
                return self._output.thought(text) if text else []
            case CallStart(_, id_, name):
                return self._output.call_start(id_, name)
            case CallArguments(_, text):
                return self._output.call_arguments(text)
            case CallEnd():
                return self._output.close()

    def _finish(self, usage: Usage) -> None:
        cut = self._reason == "length"
        self.response = {
            **self.response,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self._output.items,
            "usage": usage_object(usage),
        }

    def _state(self, event_type: str) -> bytes:
        return self._print([{"type": event_type, "response": self.response}])

    def _print(self, events: Sequence[dict[str, Any]]) -> bytes:
        printed = []
        for event in events:
            numbered = {**event, "sequence_number": self._sequence_number}
            self._sequence_number += 1
            printed.append(f"event: {event['type']}\ndata: {json.dumps(numbered)}\n\n")
        return "".join(printed).encode()

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        token = piece.token
        if token is None:
            return []
        return [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top],
            }
        ]

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
            "logprob": max(logprob, LOWEST_LOGPROB) if logprob is not None else LOWEST_LOGPROB,
        }


def error_object(error: BaseException, request_id: str) -> dict[str, Any]:
    """The error of a failed response. Its codes are few; the message says the rest."""
    code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
    return {"code": code, "message": error_body(error, request_id)["error"]["message"]}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
