"""How /v1/messages prints an answer: a message of content blocks, whole, or as Anthropic's named events.

Owns: the objects ``message`` and its events, usage in their form.
Does not own: when they are sent (``answer``), the envelope of errors (``messages_errors``).
Invariant: blocks come one after the other, each started and stopped; a stream ends with ``message_stop`` or ``error``.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.messages_errors import envelope
from mlx_cluster.gateway.openai import Answered, Head
from mlx_cluster.gateway.parts import CallArguments, CallEnd, CallStart, Part, Thought
from mlx_cluster.gateway.session import ChoiceEnd, Delta, PartDelta, Usage

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event, named by its own type."""
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode()


class MessagesDialect:
    """POST /v1/messages. ``max_tokens`` is the client's own number, which may be more than the context leaves."""

    def __init__(self, head: Head, max_tokens: int | None) -> None:
        self._head = head
        self._cut_by_context = max_tokens is not None and head.max_tokens < max_tokens
        self._index = -1  # of the block that was started last
        self._open: str | None = None  # its type, while it is open
        self._thoughts: list[str] = []  # of the open thinking block
        self._end: ChoiceEnd | None = None

    def start(self, num_choices: int) -> bytes:
        head = self._head
        message = self._message([], None, None, Usage(head.prompt_tokens, 0, head.cached_tokens))
        return event({"type": "message_start", "message": message}) + PING

    def delta(self, event_: Delta) -> bytes:
        if not event_.piece.text:
            return b""
        entered = self._enter("text", {"type": "text", "text": ""})
        return entered + self._more({"type": "text_delta", "text": event_.piece.text})

    def part(self, event_: PartDelta) -> bytes:
        match event_.part:
            case Thought(text):
                if not text:
                    return b""
                entered = self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._thoughts.append(text)
                return entered + self._more({"type": "thinking_delta", "thinking": text})
            case CallStart(_, id_, name):
                left = self._leave()  # the block before may be a call too
                return left + self._enter("tool_use", {"type": "tool_use", "id": id_, "name": name, "input": {}})
            case CallArguments(_, text):
                return self._more({"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                return self._leave()

    def choice_end(self, end: ChoiceEnd) -> bytes:
        self._end = end
        return self._leave()

    def alive(self) -> bytes:
        return PING

    def end(self, usage: Usage) -> bytes:
        end = self._end if self._end is not None else ChoiceEnd(0, "length", 0)
        delta = {
            "stop_reason": self._stop_reason(end.reason, end.stop_string),
            "stop_sequence": end.stop_string,
        }
        return event({"type": "message_delta", "delta": delta, "usage": usage_object(usage)}) + event(
            {"type": "message_stop"}
        )

    def failure(self, error: Exception, request_id: str) -> bytes:
        return b"event: error\ndata: " + envelope(error, request_id) + b"\n\n"

    def whole(self, choices: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        answered = choices[0]
        blocks = content_blocks(answered.parts)
        reason = self._stop_reason(answered.reason, answered.stop_string)
        return self._message(blocks, reason, answered.stop_string, usage)

    def _message(
        self, blocks: list[dict[str, Any]], reason: str | None, stop_sequence: str | None, usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": stop_sequence,
            "usage": usage_object(usage),
        }

    def _stop_reason(self, reason: str, stop_string: str | None) -> str:
        if stop_string is not None:
            return "stop_sequence"
        if reason == "length":
            return "model_context_window_exceeded" if self._cut_by_context else "max_tokens"
        return "tool_use" if reason == "tool_calls" else "end_turn"

    def _enter(self, kind: str, block: dict[str, Any]) -> bytes:
        """Be in a block of this kind: nothing to say when the open one is."""
        if self._open == kind:
            return b""
        stopped = self._leave()
        self._open = kind
        self._index += 1
        return stopped + event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _leave(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._more({"type": "signature_delta", "signature": signature("".join(self._thoughts))})
            self._thoughts = []
        self._open = None
        return signed + event({"type": "content_block_stop", "index": self._index})

    def _more(self, delta: dict[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._index, "delta": delta})


def content_blocks(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The blocks of a whole answer: text and reasoning that came in pieces are one block each."""
    blocks: list[dict[str, Any]] = []
    arguments: list[str] = []
    for part in parts:
        last = blocks[-1]["type"] if blocks else None
        match part:
            case Piece(text, _) if text and last == "text":
                blocks[-1]["text"] += text
            case Piece(text, _) if text:
                blocks.append({"type": "text", "text": text})
            case Thought(text, _) if text and last == "thinking":
                blocks[-1]["thinking"] += text
            case Thought(text, _) if text:
                blocks.append({"type": "thinking", "thinking": text, "signature": ""})
            case CallStart(_, id_, name):
                arguments = []
                blocks.append({"type": "tool_use", "id": id_, "name": name, "input": {}})
            case CallArguments(_, text):
                arguments.append(text)
                blocks[-1]["input"] = _object("".join(arguments))
            case _:
                pass
    for block in blocks:
        if block["type"] == "thinking":
            block["signature"] = signature(block["thinking"])
    return blocks


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; of one that the length limit cut off, as far as they came."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def signature(thinking: str) -> str:
    """What clients send back with a thinking block. It seals nothing: any history is taken as it comes."""
    return base64.b64encode(hashlib.sha256(thinking.encode()).digest()).decode()


def usage_object(usage: Usage) -> dict[str, Any]:
    """``input_tokens`` are those that had to be computed; the cached ones are counted beside them."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
