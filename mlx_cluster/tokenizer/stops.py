"""Stop strings in a stream of text.

Owns: which part of the text may be shown while a stop string may still be under way.
Invariant: what is released does not depend on how the text was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds text back while it may be the beginning of a stop string; never releases a stop string.

    The stop string that is *complete* first wins (of two complete at once, the longer), as if the text came one
    character at a time.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("ND of it")
    (('the ', False), ('', True))
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.hit = False
        self.matched: str | None = None  # the stop string that was hit

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was completed (then this was the last text)."""
        if self.hit:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.hit, self._held, self.matched = True, "", text[start:end]
            return text[:start], True
        keep = self._length_to_hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, when no more is to come."""
        held, self._held = self._held, ""
        return held

    def _length_to_hold(self, text: str) -> int:
        """Length of the longest tail of ``text`` that is the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
