"""The output items of a response, as they grow, and the events that tell of it.

Owns: messages, reasoning and calls as items of ``output``, and the order of the events of each.
Does not own: sequence numbers, the response around them (``responses_dialect``).
Invariant: items come one after the other; each is added, grows and is done, and what is done is whole. Pure: ids are
drawn by ``new_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

Event = dict[str, Any]


class Output:
    def __init__(self, new_id: Callable[[str], str], custom: frozenset[str] = frozenset()) -> None:
        """``new_id`` gives an id that begins with the given prefix; ``custom`` are tools whose input is plain text."""
        self.items: list[dict[str, Any]] = []
        self._new_id = new_id
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []
        self._open = False
        self._custom: frozenset[str] = custom

    def text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        """More of the answer's text."""
        events: list[Event] = []
        if not self._in("message"):
            events = self.close()
            item = {"id": self._new_id("msg"), "type": "message", "role": "assistant", "content": []}
            events += self._add(item) + self._part_added({"type": "output_text", "text": "", "annotations": []})
        self._texts.append(text)
        self._logprobs += logprobs
        return [*events, {**self._place("response.output_text.delta"), "delta": text, "logprobs": logprobs}]

    def thought(self, text: str) -> list[Event]:
        """More reasoning."""
        events: list[Event] = []
        if not self._in("reasoning"):
            events = self.close()
            events += self._add({"id": self._new_id("rs"), "type": "reasoning", "summary": [], "content": []})
            events += self._part_added({"type": "reasoning_text", "text": ""})
        self._texts.append(text)
        return [*events, {**self._place("response.reasoning_text.delta"), "delta": text}]

    def call_start(self, call_id: str, name: str) -> list[Event]:
        events = self.close()
        if name in self._custom:
            item = {
                "id": self._new_id("ctc"),
                "type": "custom_tool_call",
                "call_id": call_id,
                "name": name,
                "input": "",
            }
        else:
            item = {
                "id": self._new_id("fc"),
                "type": "function_call",
                "call_id": call_id,
                "name": name,
                "arguments": "",
            }
        return events + self._add(item)

    def call_arguments(self, text: str) -> list[Event]:
        self._texts.append(text)
        if self._in("custom_tool_call"):
            return []  # its input stands inside of the arguments and is shown when they are whole
        return [{**self._item("response.function_call_arguments.delta"), "delta": text}]

    def close(self, status: str = "completed") -> list[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return []
        self._open = False
        item, text = self.items[-1], "".join(self._texts)
        match item["type"]:
            case "message":
                events = self._close_message(item, text)
            case "reasoning":
                events = self._close_reasoning(item, text)
            case "custom_tool_call":
                item["input"] = custom_input(text)
                place = self._item
                events = [
                    {**place("response.custom_tool_call_input.delta"), "delta": item["input"]},
                    {**place("response.custom_tool_call_input.done"), "input": item["input"]},
                ]
            case _:
                item["arguments"] = text
                done = self._item("response.function_call_arguments.done")
                events = [{**done, "name": item["name"], "arguments": text}]
        item["status"] = status
        self._texts, self._logprobs = [], []
        ended = {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}
        return [*events, ended]

    def _close_message(self, item: dict[str, Any], text: str) -> list[Event]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}
        item["content"] = [part]
        return [
            {**self._place("response.output_text.done"), "text": text, "logprobs": self._logprobs},
            {**self._place("response.content_part.done"), "part": part},
        ]

    def _close_reasoning(self, item: dict[str, Any], text: str) -> list[Event]:
        part = {"type": "reasoning_text", "text": text}
        item["content"] = [part]
        return [
            {**self._place("response.reasoning_text.done"), "text": text},
            {**self._place("response.content_part.done"), "part": part},
        ]

    def _in(self, kind: str) -> bool:
        return self._open and self.items[-1]["type"] == kind

    def _add(self, item: dict[str, Any]) -> list[Event]:
        item["status"] = "in_progress"
        self.items.append(item)
        self._open = True
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}]

    def _part_added(self, part: dict[str, Any]) -> list[Event]:
        return [{**self._place("response.content_part.added"), "part": part}]

    def _place(self, event_type: str) -> Event:
        return {**self._item(event_type), "content_index": 0}

    def _item(self, event_type: str) -> Event:
        return {"type": event_type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def custom_input(arguments: str) -> str:
    """The plain text in the arguments of a custom tool's call, which the model gives as ``{"input": "…"}``."""
    try:
        found = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    return found["input"] if isinstance(found, dict) and isinstance(found.get("input"), str) else arguments
