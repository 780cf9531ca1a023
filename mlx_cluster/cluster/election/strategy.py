"""Who should lead, where several could.

Owns: the priorities of the configured strategy, and when the leader hands over. Pure: facts and time are arguments.
Does not own: who *may* lead; that is decided by votes, and a priority never overrules one.
Invariant: nobody is handed the lead who has not been the better one without a break for a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["health_based", "load_based", "round_robin", "manual"]
NEUTRAL = 0.5


@dataclass(frozen=True, slots=True)
class Candidate:
    """A living voter that may lead. ``health`` and ``load`` are in 0…1."""

    node: str
    health: float = 1.0
    load: float = 0.0


@dataclass(frozen=True, slots=True)
class Pin:
    """The operator's word: this node should lead, until ``expires_at`` where one was given."""

    node: str
    expires_at: float | None = None

    def holds(self, now: float) -> bool:
        return self.expires_at is None or now < self.expires_at


def priorities(
    strategy: Strategy, candidates: Iterable[Candidate], leader: str | None, pin: Pin | None, now: float
) -> dict[str, float]:
    """Node → priority in 0…1. A pin that holds outweighs every strategy; ``manual`` knows nothing else."""
    living = sorted(candidates, key=lambda c: c.node)
    match strategy:
        case "health_based":
            ranked = {c.node: c.health * 0.9 for c in living}
        case "load_based":
            ranked = {c.node: (1 - c.load) * 0.9 for c in living}
        case "round_robin":
            ranked = _in_turn([c.node for c in living], leader)
        case "manual":
            ranked = {c.node: NEUTRAL for c in living}
    if pin is not None and pin.holds(now) and pin.node in ranked:
        ranked[pin.node] = 1.0
    return ranked


def _in_turn(nodes: list[str], leader: str | None) -> dict[str, float]:
    """The node after the leader comes first, the leader itself last."""
    after = sum(node <= leader for node in nodes) if leader is not None else 0
    order = nodes[after:] + nodes[:after]
    return {node: 0.9 * (1 - place / len(order)) for place, node in enumerate(order)}


class HandOvers:
    """Run by the leader: says to whom it should hand over, if to anybody.

    ``margin`` is how much better another node must be. Under ``round_robin`` a turn lasts ``turn_seconds``. What a pin
    asks for needs neither margin nor cool-down, only that its node has been there for ``settle_seconds``.
    """

    def __init__(
        self,
        strategy: Strategy,
        margin: float = 0.3,
        hold_seconds: float = 30.0,
        cooldown_seconds: float = 120.0,
        turn_seconds: float = 3600.0,
        settle_seconds: float = 3.0,
    ) -> None:
        self._strategy = strategy
        self._margin, self._hold, self._cooldown = margin, hold_seconds, cooldown_seconds
        self._turn, self._settle = turn_seconds, settle_seconds
        self._leads_since: float | None = None
        self._better: str | None = None
        self._better_since = 0.0

    def stopped(self) -> None:
        """This node no longer leads."""
        self._leads_since = self._better = None

    def observe(self, leader: str, candidates: Iterable[Candidate], pin: Pin | None, now: float) -> str | None:
        """The node to hand over to now, or None. Call it at every heartbeat while leading."""
        ranked = priorities(self._strategy, candidates, leader, pin, now)
        if self._leads_since is None:
            self._leads_since = now
        best = max(ranked, key=lambda node: (ranked[node], node == leader, node), default=leader)
        if best == leader:
            self._better = None
            return None
        pinned = pin is not None and pin.holds(now) and best == pin.node
        if not pinned and pin is not None and pin.holds(now) and pin.node == leader:
            return None
        if best != self._better:
            self._better, self._better_since = best, now
        return best if self._is_due(ranked[best] - ranked.get(leader, 0.0), pinned, now) else None

    def _is_due(self, gain: float, pinned: bool, now: float) -> bool:
        assert self._leads_since is not None
        led, held = now - self._leads_since, now - self._better_since
        if pinned:
            return held >= self._settle
        if self._strategy == "round_robin":
            return led >= self._turn and held >= self._settle
        return gain >= self._margin and held >= self._hold and led >= self._cooldown
