"""The output items of a response, as they grow, and the events that tell of it.

Owns: messages, reasoning and calls as items of ``output``, and the order of the events of each.
Does not own: sequence numbers, the response around them (``responses_dialect``).
Invariant: items come one after the other; each is added, grows and is done, and what is done is whole. Pure: ids are
drawn by ``new_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]


class Output:
    def __init__(self, new_id: Callable[[str], str]) -> None:
        """``new_id`` gives an id that begins with the given prefix."""
        self.items: list[dict[str, Any]] = []
        self._new_id = new_id
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []
        self._open = False

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

    def close(self, status: str = "completed") -> list[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return []
        self._open = False
        item, text = self.items[-1], "".join(self._texts)
        events = self._close_message(item, text)
        item["status"] = status
        self._texts, self._logprobs = [], []
        done = {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}
        return [*events, done]

    def _close_message(self, item: dict[str, Any], text: str) -> list[Event]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}
        item["content"] = [part]
        return [
            {**self._place("response.output_text.done"), "text": text, "logprobs": self._logprobs},
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
        item = self.items[-1]
        return {"type": event_type, "item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
