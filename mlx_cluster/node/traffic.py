"""What the links of a pipeline carry: from growing sums of bytes to bytes per second.

Owns: the window. Pure: time is an argument. Does not own: the sums (the engine adds up its stages' reports).
Invariant: sums that fall belong to a new engine; nothing of the earlier one counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

WINDOW_SECONDS = 10.0
SHORTEST_SECONDS = 1.0  # a rate over less says more of the moment than of the link


class Traffic:
    def __init__(self) -> None:
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()

    def rates(self, now: float, sums: Sequence[int]) -> tuple[float, ...]:
        """Bytes per second of each link over the last ten seconds or so; empty until a second was seen."""
        sums = tuple(sums)
        if self._seen:
            _, last = self._seen[-1]
            if len(last) != len(sums) or any(new < old for new, old in zip(sums, last, strict=True)):
                self._seen.clear()
        if not self._seen or now - self._seen[-1][0] >= SHORTEST_SECONDS:
            self._seen.append((now, sums))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_SECONDS:
            self._seen.popleft()
        began, first = self._seen[0]
        if now - began < SHORTEST_SECONDS:
            return ()
        return tuple(round((new - old) / (now - began), 1) for new, old in zip(sums, first, strict=True))
