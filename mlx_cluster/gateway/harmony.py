"""Reads answers of the harmony form, in which everything a model says is a message in a channel (gpt-oss writes it).

Owns: the state between two pieces: in a message's head, or in its body and of which kind.
Does not own: the form's tokens (``tokenizer.harmony``), other families' answers (``splitter``).
Invariant: pure; analysis is reasoning, what is addressed to a function is a call, everything else is text; what is
shown does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.parts import CallArguments, CallEnd, CallStart, Part, Thought
from mlx_cluster.gateway.splitter import Shape, Splitter
from mlx_cluster.tokenizer.harmony import CALL, CHANNEL, END, MESSAGE, RETURN, START

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_ENDS = (END, RETURN, CALL, START, CHANNEL)


class HarmonySplitter:
    """One choice's, with the interface of ``Splitter``: marks are special tokens, so each is a whole piece."""

    def __init__(self, shape: Shape, mint: Callable[[], str]) -> None:
        self._parallel = shape.parallel
        self._mint = mint
        self._head: str | None = ""  # of the message that begins; None inside its body
        self._kind = "text"
        self.num_calls = 0
        self.done = False

    @property
    def thinking(self) -> bool:
        return self._kind == "analysis" and self._head is None

    def push(self, piece: Piece) -> list[Part]:
        """What may be shown after this piece."""
        if self.done:
            return []
        if self._head is not None:
            if piece.text != MESSAGE:
                self._head += piece.text
                return []
            return self._begin(self._head)
        mark = next((mark for mark in _ENDS if piece.text.endswith(mark)), None)
        if mark is None:
            return self._body(piece)
        rest = piece.text.removesuffix(mark)  # of a character that the mark cut off
        ended = [*(self._body(Piece(rest, None)) if rest else ()), *self._end()]
        self._head = mark if mark == CHANNEL else ""
        return ended

    def finish(self) -> list[Part]:
        """What is open at the end; a model that wrote no head at all has its words shown as they are."""
        if self.done:
            return []
        if self._head is None:
            return self._end()
        stray = re.sub(r"<\|\w+\|>", "", self._head) if CHANNEL not in self._head else ""
        return [Piece(stray, None)] if stray.strip() not in ("", "assistant") else []

    def _begin(self, head: str) -> list[Part]:
        self._head = None
        recipient, channel = _RECIPIENT.search(head), _CHANNEL_NAME.search(head)
        if recipient is not None:
            self._kind = "call"
            self.num_calls += 1
            return [CallStart(self.num_calls - 1, self._mint(), recipient[1])]
        self._kind = "analysis" if channel is not None and channel[1] == "analysis" else "text"
        return []

    def _body(self, piece: Piece) -> list[Part]:
        match self._kind:
            case "call":
                return [CallArguments(self.num_calls - 1, piece.text)] if piece.text else []
            case "analysis":
                return [Thought(piece.text, piece.token)]
            case _:
                return [piece]

    def _end(self) -> list[Part]:
        if self._kind != "call":
            return []
        self._kind = "text"
        self.done = not self._parallel
        return [CallEnd(self.num_calls - 1)]


def splitter_for(shape: Shape, mint: Callable[[], str]) -> Splitter | HarmonySplitter | None:
    """What reads answers of this shape; None where there is nothing to look for."""
    if shape.harmony:
        return HarmonySplitter(shape, mint)
    return None if shape.plain else Splitter(shape, mint)
