"""Which of a node's addresses to dial.

Owns: the ranking by measured round trips, with hysteresis. Pure.
Does not own: measuring (``node.round_trips``), channels.
Invariant: without a measurement the configured host is dialled; an address that answers is never left for one that does
not, and one that does not is left for one that does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

# The least of so many round trips counts: what a busy machine adds to one says nothing of the link.
WINDOW = 5
# Another address must be so much quicker than the one in use, by share and by seconds, or channels would come and go.
QUICKER_SHARE = 0.7
QUICKER_SECONDS = 50e-6


class RankedAddresses:
    """Those of one node. ``known`` is the one that every node has in its configuration; others may be quicker."""

    def __init__(self, known: str, others: Sequence[str] = ()) -> None:
        self.candidates = tuple(dict.fromkeys((*others, known)))
        self.known = self.current = known
        self._seconds: dict[str, deque[float]] = {each: deque(maxlen=WINDOW) for each in self.candidates}

    def measured(self, address: str, seconds: float | None) -> None:
        """A round trip to ``address``; None when there was no answer, which makes it forget the earlier ones."""
        if seconds is None:
            self._seconds[address].clear()
        else:
            self._seconds[address].append(seconds)

    def seconds(self, address: str) -> float | None:
        """Its round trip; None while it does not answer, or has not been asked yet."""
        return min(self._seconds[address], default=None)

    def rank(self) -> bool:
        """After every candidate was measured: choose. True when another one is dialled from now on."""
        before = self.current
        answering = [(seconds, each) for each in self.candidates if (seconds := self.seconds(each)) is not None]
        if answering:
            # Of equals the first in the configuration.
            quickest, best = min(answering, key=lambda pair: pair[0])
            now = self.seconds(before)
            if now is None or (quickest < now * QUICKER_SHARE and quickest < now - QUICKER_SECONDS):
                self.current = best
        return self.current != before


class DialledAddresses(Mapping[int, str]):
    """The address to dial now, by node id: it changes under a reader's hands, from one look to the next."""

    def __init__(self, ranked: Mapping[int, RankedAddresses]) -> None:
        self.ranked = dict(ranked)
        self._by_known = {each.known: each for each in self.ranked.values()}

    def __getitem__(self, node_id: int) -> str:
        return self.ranked[node_id].current

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranked)

    def __len__(self) -> int:
        return len(self.ranked)

    def instead_of(self, known: str) -> str:
        """What to dial where a message, or the configuration, names this address."""
        ranked = self._by_known.get(known)
        return ranked.current if ranked is not None else known

    def of_port(self, node_id: int, address: str) -> str:
        """What to dial for another port of this node, of which a message says ``address``."""
        ranked = self.ranked.get(node_id)
        if ranked is None or ranked.current == ranked.known:
            return address
        return f"{ranked.current.rpartition(':')[0]}:{address.rpartition(':')[2]}"

    def round_trips(self) -> tuple[tuple[int, float], ...]:
        """(node id, seconds) of the addresses in use, as far as they answer; in microseconds' precision."""
        found = ((node_id, each.seconds(each.current)) for node_id, each in sorted(self.ranked.items()))
        return tuple((node_id, round(seconds, 6)) for node_id, seconds in found if seconds is not None)
