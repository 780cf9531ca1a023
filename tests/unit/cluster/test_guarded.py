from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from mlx_cluster.cluster.guarded import GuardedCalls
from mlx_cluster.cluster.retry import Backoff, BreakerState, CircuitBreaker
from mlx_cluster.errors import DeadlineExceeded, Unavailable


class Peer:
    """Answers by a script of errors (None: an answer) on a clock of its own; every attempt takes ``seconds``."""

    def __init__(self, script: Iterable[Exception | None], seconds: float = 0.0) -> None:
        self.script, self.seconds = list(script), seconds
        self.now = 0.0
        self.given: list[float] = []  # the seconds that each attempt was given
        self.pauses: list[float] = []
        self.transitions: list[tuple[str, BreakerState, str]] = []
        self.guard = GuardedCalls(
            "mini2",
            on_transition=lambda *what: self.transitions.append(what),
            breaker=CircuitBreaker(threshold=3, first_seconds=1.0),
            backoff=Backoff(first_seconds=0.1, longest_seconds=2.0, max_attempts=4),
            clock=lambda: self.now,
            draw=lambda: 1.0,
            sleep=self.sleep,
        )

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    async def attempt(self, seconds: float) -> str:
        self.given.append(seconds)
        self.now += self.seconds
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        return "answer"


def lost() -> Unavailable:
    return Unavailable("mini2 cannot be reached")


async def test_what_may_arrive_twice_is_sent_again_after_growing_pauses() -> None:
    peer = Peer([lost(), lost()])
    assert await peer.guard.call(peer.attempt, 5.0, idempotent=True) == "answer"
    assert peer.pauses == [0.1, 0.2]
    assert peer.given == pytest.approx([5.0, 4.9, 4.7])
    assert peer.transitions == []


async def test_what_may_not_arrive_twice_is_sent_once() -> None:
    peer = Peer([lost()])
    with pytest.raises(Unavailable):
        await peer.guard.call(peer.attempt, 5.0)
    assert len(peer.given) == 1


async def test_a_deadline_that_has_passed_is_not_tried_again() -> None:
    peer = Peer([DeadlineExceeded("mini2 did not answer in time")])
    with pytest.raises(DeadlineExceeded):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    assert len(peer.given) == 1


async def test_pauses_end_before_the_deadline_of_the_caller() -> None:
    peer = Peer([lost(), lost(), lost()], seconds=1.0)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await peer.guard.call(peer.attempt, 2.15, idempotent=True)
    assert len(peer.given) == 2
    assert peer.now <= 2.15


async def test_an_open_circuit_refuses_at_once_and_says_when_it_is_tried_again() -> None:
    peer = Peer([lost()] * 10)
    with pytest.raises(Unavailable):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    assert len(peer.given) == 3, "the third failure opened the circuit: no fourth attempt"
    with pytest.raises(Unavailable, match=r"mini2 did not answer lately; it is tried again in 1\.0 s"):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    assert len(peer.given) == 3
    assert peer.transitions == [("mini2", "open", "mini2 cannot be reached")]


async def test_a_trial_that_is_answered_closes_the_circuit() -> None:
    peer = Peer([lost()] * 3)
    with pytest.raises(Unavailable):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    peer.now += 1.0
    assert await peer.guard.call(peer.attempt, 5.0) == "answer"
    assert [state for _, state, _ in peer.transitions] == ["open", "half_open", "closed"]


async def test_a_heartbeat_closes_the_circuit_at_once() -> None:
    peer = Peer([lost()] * 3)
    with pytest.raises(Unavailable):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    peer.guard.heard()
    assert peer.transitions[-1] == ("mini2", "closed", "its heartbeat was heard")
    assert await peer.guard.call(peer.attempt, 5.0) == "answer"


async def test_an_empty_budget_turns_retries_off_but_no_first_attempt() -> None:
    peer = Peer([])
    for _ in range(10):
        peer.script = [lost(), None]
        assert await peer.guard.call(peer.attempt, 5.0, idempotent=True) == "answer"
        peer.now = 0.0  # no time passes: the bucket does not fill
    peer.script = [lost(), None]
    with pytest.raises(Unavailable):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    peer.script = []
    assert await peer.guard.call(peer.attempt, 5.0) == "answer"


async def test_a_cancelled_trial_leaves_the_next_one_free() -> None:
    peer = Peer([lost()] * 3)
    with pytest.raises(Unavailable):
        await peer.guard.call(peer.attempt, 5.0, idempotent=True)
    peer.now += 1.0

    async def endless(_seconds: float) -> str:
        await asyncio.Event().wait()
        return "never"

    trial = asyncio.create_task(peer.guard.call(endless, 5.0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="tried again in"):
        await peer.guard.call(peer.attempt, 5.0)
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)
    assert await peer.guard.call(peer.attempt, 5.0) == "answer"
