"""Calls to one peer under a deadline: tried again where that is safe, refused at once where it is pointless.

Owns: the clockwork around ``retry``'s rules. Does not own: what is called (``rpc``); heartbeats and votes do not pass
here, because they are how a peer is found to be back.
Invariant: a call never takes longer than its caller's deadline, pauses included; only what may arrive twice is sent
twice.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mlx_cluster import log
from mlx_cluster.cluster.retry import Backoff, BreakerState, CircuitBreaker, RetryBudget
from mlx_cluster.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")
# (name of the peer, the new state of its circuit, why)
OnTransition = Callable[[str, BreakerState, str], None]

_log = log.get(__name__)


def _log_transition(name: str, state: BreakerState, reason: str) -> None:
    _log.info("circuit " + state.replace("_", "-"), peer=name, reason=reason)


class GuardedCalls:
    """One per peer, for as long as this node knows it."""

    def __init__(
        self,
        name: str,
        *,
        on_transition: OnTransition = _log_transition,
        breaker: CircuitBreaker | None = None,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._name, self._on_transition = name, on_transition
        self._breaker, self._backoff = breaker or CircuitBreaker(), backoff or Backoff()
        self._clock, self._draw, self._sleep = clock, draw, sleep
        self._budget = RetryBudget(clock())

    @property
    def state(self) -> BreakerState:
        return self._breaker.state

    async def call(
        self, attempt: Callable[[float], Awaitable[T]], timeout_seconds: float, *, idempotent: bool = False
    ) -> T:
        """The answer of ``attempt(seconds left)``, which raises ``Unavailable`` or ``DeadlineExceeded`` when the peer
        is not reached.

        Raises ``Unavailable`` at once while the circuit is open, else the error of the last attempt.
        """
        ends = self._clock() + timeout_seconds
        failures = 0
        while True:
            try:
                with self.passing():
                    return await attempt(max(0.0, ends - self._clock()))
            except Unavailable:
                failures += 1
                pause = self._backoff.pause_seconds(failures, self._draw())
                if not idempotent or not self._may_retry(failures, pause, ends):
                    raise
            await self._sleep(pause)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around one call, which raises ``Unavailable`` or ``DeadlineExceeded`` when the peer is not reached.

        Raises ``Unavailable`` while the circuit is open. What the peer itself refuses belongs behind the call.
        """
        if not self._noting("trying again", lambda: self._breaker.begin(self._clock())):
            wait = self._breaker.wait_seconds(self._clock())
            raise Unavailable(
                f"{self._name} did not answer lately; it is tried again in {wait:.1f} s, or when it is heard",
                retry_after_seconds=wait,
            )
        ended = False
        try:
            yield
            ended = True
            self._noting("it answered", self._breaker.succeeded)
        except (Unavailable, DeadlineExceeded) as error:
            ended = True
            self._noting(str(error), lambda: self._breaker.failed(self._clock()))
            raise
        finally:
            if not ended:
                self._breaker.left()

    def heard(self, what: str = "its heartbeat was heard") -> None:
        """The peer gave a sign of life."""
        self._noting(what, self._breaker.succeeded)

    def _may_retry(self, failures: int, pause: float, ends: float) -> bool:
        now = self._clock()
        if failures >= self._backoff.max_attempts or now + pause >= ends:
            return False
        return self._breaker.wait_seconds(now) <= pause and self._budget.spend(now)

    def _noting(self, reason: str, change: Callable[[], T]) -> T:
        before = self._breaker.state
        result = change()
        if self._breaker.state != before:
            self._on_transition(self._name, self._breaker.state, reason)
        return result
