"""Finds reasoning and tool calls in the text of one choice while it comes.

Owns: the state between two pieces: where in the answer we are, and what is held back because a marker may be under way.
Does not own: markers and formats (``tokenizer``), stop strings (``choice``, which come first).
Invariant: pure; what is shown does not depend on how the text was cut into pieces. Text that looks like a call but does
not parse as one is shown as the text it is, with the tokens it came from.

White space directly after reasoning is dropped, and white space around calls too, unless text follows it.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.parts import CallArguments, CallEnd, CallStart, Part, Thought
from mlx_cluster.tokenizer.harmony import MARKS
from mlx_cluster.tokenizer.reasoning import Markers
from mlx_cluster.tokenizer.tools import ParsedCall, ToolFormat

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class Shape:
    """What to look for in an answer. ``begins_in_reasoning``: the prompt has opened it already."""

    reasoning: Markers | None = None
    begins_in_reasoning: bool = False
    format: ToolFormat | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    parallel: bool = True
    harmony: bool = False  # the answer is messages in channels, see ``harmony``

    @property
    def plain(self) -> bool:
        return self.reasoning is None and self.format is None and not self.harmony

    @property
    def markers(self) -> tuple[str, ...]:
        """Every text that a special token may have a part in."""
        if self.harmony:
            return MARKS
        reasoning = (self.reasoning.start, self.reasoning.end) if self.reasoning else ()
        return (*reasoning, self.format.start, self.format.end) if self.format else reasoning


PLAIN = Shape()


class _Mode(Enum):
    TEXT = 1
    REASONING = 2
    CALL = 3  # from the start marker on, which is still held
    ARGUMENTS = 4
    TAIL = 5  # after the arguments, up to the end marker


class Splitter:
    """One choice's. ``mint`` gives the ids of calls."""

    def __init__(self, shape: Shape, mint: Callable[[], str]) -> None:
        self._shape = shape
        self._mint = mint
        self._mode = _Mode.REASONING if shape.begins_in_reasoning else _Mode.TEXT
        self._held: deque[Piece] = deque()
        self._text = ""  # of the held pieces
        self._parts: list[Part] = []
        self._drop_space = shape.begins_in_reasoning
        self._hold_space = shape.reasoning is not None
        self._fresh = True  # nothing but reasoning has come: a start marker means reasoning only here
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.num_calls = 0
        self.done = False

    @property
    def thinking(self) -> bool:
        return self._mode is _Mode.REASONING

    def push(self, piece: Piece) -> list[Part]:
        """Parts that may be shown after this piece."""
        if self.done:
            return []
        self._held.append(piece)
        self._text += piece.text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """What was held back, now that no piece is to come."""
        return [] if self.done else self._run(final=True)

    def _run(self, *, final: bool) -> list[Part]:
        steps = {
            _Mode.TEXT: self._in_text,
            _Mode.REASONING: self._in_reasoning,
            _Mode.CALL: self._in_call,
            _Mode.ARGUMENTS: self._in_arguments,
            _Mode.TAIL: self._in_tail,
        }
        while not self.done and steps[self._mode](final):
            pass
        parts, self._parts = self._parts, []
        return parts

    # -- the modes: each returns whether another may go on at once ----------------------------------------

    def _in_text(self, final: bool) -> bool:
        if self._drop_space:
            self._discard(len(self._text) - len(self._text.lstrip()))
        starts: dict[str, _Mode] = {}
        if self._shape.reasoning is not None and self._fresh:
            starts[self._shape.reasoning.start] = _Mode.REASONING
        if self._shape.format is not None:
            starts[self._shape.format.start] = _Mode.CALL
        at, marker = _first(self._text, starts)
        end = at if marker else len(self._text) - (0 if final else _partial(self._text, starts))
        blank = not self._text[:end].strip()
        if blank and (self._hold_space or self._drop_space):
            if not marker:
                if final:
                    self._discard(len(self._text))
                return False
            self._discard(end)
        elif end:
            self._show_text(end)
        if not marker:
            return False
        self._mode = starts[marker]
        if self._mode is _Mode.REASONING:
            self._discard(len(marker))
            self._drop_space = True
        return True

    def _in_reasoning(self, final: bool) -> bool:
        assert self._shape.reasoning is not None
        if self._drop_space:
            self._discard(len(self._text) - len(self._text.lstrip()))
        marker = self._shape.reasoning.end
        at = self._text.find(marker)
        end = at if at >= 0 else len(self._text) - (0 if final else _partial(self._text, (marker,)))
        if end:
            self._drop_space = False
            self._parts += [Thought(piece.text, piece.token) for piece in self._take(end)]
        if at < 0:
            return False
        self._discard(len(marker))
        self._mode, self._drop_space, self._fresh = _Mode.TEXT, True, False
        return True

    def _in_call(self, final: bool) -> bool:
        format_ = self._shape.format
        assert format_ is not None
        begin = len(format_.start)
        if format_.incremental and (header := _HEADER.match(self._text, begin)) is not None:
            self._start_call(json.loads(header[1]))
            self._discard(header.end())
            self._mode, self._depth, self._in_string, self._escaped = _Mode.ARGUMENTS, 0, False, False
            return True
        at = self._text.find(format_.end, begin) if format_.end else -1
        if at < 0 and not final:
            return False
        inside, after = (
            (self._text[begin:], len(self._text)) if at < 0 else (self._text[begin:at], at + len(format_.end))
        )
        try:
            calls = format_.parse(inside, self._shape.tools)
        except ValueError:
            self._show_text(after)
        else:
            self._discard(after)
            for call in calls:
                self._whole_call(call)
        self._mode = _Mode.TEXT
        return bool(self._text)

    def _in_arguments(self, final: bool) -> bool:
        for at, char in enumerate(self._text):
            self._scan(char)
            broken = char == "<" and not self._in_string  # JSON has none there: the call ends without its brace
            if self._depth == 0 or broken:
                self._show_arguments(at if broken else at + 1)
                self._end_call()
                self._mode = _Mode.TAIL
                return True
        self._show_arguments(len(self._text))
        return False

    def _in_tail(self, final: bool) -> bool:
        assert self._shape.format is not None
        marker = self._shape.format.end
        at = self._text.find(marker)
        if at < 0:
            self._discard(len(self._text) - (0 if final else _partial(self._text, (marker,))))
            return False
        self._discard(at + len(marker))
        self._mode = _Mode.TEXT
        return True

    # -- calls ----------------------------------------------------------------------------------------

    def _start_call(self, name: str) -> None:
        self._parts.append(CallStart(self.num_calls, self._mint(), name))
        self.num_calls += 1
        self._fresh, self._drop_space, self._hold_space = False, False, True

    def _show_arguments(self, end: int) -> None:
        text = self._text[:end]
        self._discard(end)
        if text:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def _end_call(self) -> None:
        self._parts.append(CallEnd(self.num_calls - 1))
        self.done = not self._shape.parallel

    def _whole_call(self, call: ParsedCall) -> None:
        if not self.done:
            self._start_call(call.name)
            self._parts.append(CallArguments(self.num_calls - 1, call.arguments))
            self._end_call()

    def _scan(self, char: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    # -- held pieces ------------------------------------------------------------------------------------

    def _show_text(self, end: int) -> None:
        self._parts += self._take(end)
        self._fresh = self._drop_space = self._hold_space = False

    def _discard(self, count: int) -> None:
        if count:
            self._take(count)

    def _take(self, count: int) -> list[Piece]:
        """The first ``count`` characters as pieces; a piece that is cut keeps its token with its first part."""
        self._text = self._text[count:]
        taken: list[Piece] = []
        while self._held and len(self._held[0].text) <= count:
            piece = self._held.popleft()
            count -= len(piece.text)
            taken.append(piece)
        if count:
            piece = self._held.popleft()
            taken.append(Piece(piece.text[:count], piece.token))
            self._held.appendleft(Piece(piece.text[count:], None))
        return taken


def _first(text: str, markers: Mapping[str, Any]) -> tuple[int, str]:
    """The place and the text of the marker that comes first, or ``(-1, "")``."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found, default=(-1, ""))


def _partial(text: str, markers: Any) -> int:
    """Length of the longest end of ``text`` that is the beginning of a marker."""
    longest = max((len(marker) for marker in markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
