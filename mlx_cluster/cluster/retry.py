"""When a call to a peer is tried again, and when it is not even tried: back-off, a budget, a circuit breaker.

Owns: the three rules, as state machines without a clock. Does not own: calls and time (``guarded``).
Invariant: time and chance are arguments; an open circuit lets one call through at a time after its pause, and closes
as soon as the peer is heard in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Full jitter: a pause is drawn evenly from 0 up to a bound that doubles, so that callers do not meet again."""

    first_seconds: float = 0.1
    longest_seconds: float = 2.0
    max_attempts: int = 4

    def pause_seconds(self, attempt: int, chance: float) -> float:
        """The pause behind the ``attempt``-th failure (from 1); ``chance`` is in 0…1."""
        bound: float = min(self.longest_seconds, self.first_seconds * 2.0 ** min(attempt - 1, 32))
        return bound * chance


class RetryBudget:
    """So many retries may be spent at once, and so many per second in the long run.

    Retries help against an accident and hurt against a peer that cannot keep up: there they only add to what it has
    to do. An empty bucket turns them off; first attempts do not count.
    """

    def __init__(self, now: float, *, capacity: float = 10.0, per_second: float = 0.5) -> None:
        self._capacity, self._per_second = capacity, per_second
        self._tokens, self._filled_at = capacity, now

    def tokens(self, now: float) -> float:
        return min(self._capacity, self._tokens + max(0.0, now - self._filled_at) * self._per_second)

    def spend(self, now: float) -> bool:
        """Take one retry out of the bucket; False when there is none."""
        tokens = self.tokens(now)
        if tokens < 1.0:
            return False
        self._tokens, self._filled_at = tokens - 1.0, now
        return True


class CircuitBreaker:
    """Closed: calls pass. After ``threshold`` failures in a row it opens: none passes for a pause that doubles with
    each opening. Then half-open: one call passes, and its end decides.
    """

    def __init__(self, *, threshold: int = 5, first_seconds: float = 1.0, longest_seconds: float = 30.0) -> None:
        self._threshold, self._first_seconds, self._longest_seconds = threshold, first_seconds, longest_seconds
        self._state: BreakerState = "closed"
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._trying = False

    @property
    def state(self) -> BreakerState:
        return self._state

    def wait_seconds(self, now: float) -> float:
        """How long until a call may pass; 0: it may now. While the one trial of a half-open circuit is under way, its
        answer is due any moment: the wait is a first pause.
        """
        if self._state == "open":
            return max(0.0, self._until - now)
        return self._first_seconds if self._trying else 0.0

    def begin(self, now: float) -> bool:
        """A call wants to pass. When True, ``succeeded``, ``failed`` or ``left`` must follow."""
        if self.wait_seconds(now) > 0.0:
            return False
        if self._state == "open":
            self._state = "half_open"
        self._trying = self._state == "half_open"
        return True

    def succeeded(self) -> None:
        """The peer answered, or was heard otherwise."""
        self._state, self._failures, self._openings, self._trying = "closed", 0, 0, False

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._state == "half_open" or (self._state == "closed" and self._failures >= self._threshold):
            pause = min(self._longest_seconds, self._first_seconds * 2.0 ** min(self._openings, 32))
            self._state, self._until, self._trying = "open", now + pause, False
            self._openings += 1

    def left(self) -> None:
        """The caller went away before there was an answer: nothing is known, and the next one may try."""
        self._trying = False
