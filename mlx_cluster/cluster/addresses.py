"""Which of a node's addresses to dial.

Owns: the ranking by measured round trips, with hysteresis. Pure; one thread measures and ranks while others read.
Does not own: measuring (``node.round_trips``), channels, where hints come from (``discovery``).
Invariant: without a measurement the configured host is dialled; an address that answers is never left for one that does
not, and one that does not is left for one that does; a hinted address is dialled only while no configured one answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

# The least of so many round trips counts: what a busy machine adds to one says nothing of the link.
WINDOW = 5
# Another address must be so much quicker than the one in use, by share and by seconds, or channels would come and go.
QUICKER_SHARE = 0.7
QUICKER_SECONDS = 50e-6


class RankedAddresses:
    """Those of one node. ``known`` is the one that every node has in its configuration; others may be quicker."""

    def __init__(self, known: str, others: Sequence[str] = ()) -> None:
        self._configured = self.candidates = tuple(dict.fromkeys((*others, known)))
        self.known = self.current = known
        self._seconds: dict[str, tuple[float, ...]] = {}

    def hinted(self, further: Sequence[str]) -> None:
        """These may be dialled too, from now on, while no configured one answers; they replace earlier hints."""
        self.candidates = tuple(dict.fromkeys((*self._configured, *further)))
        self._seconds = {each: self._seconds.get(each, ()) for each in self.candidates}
        if self.current not in self.candidates:
            self.current = self.known

    def measured(self, address: str, seconds: float | None) -> None:
        """A round trip to ``address``; None when there was no answer, which makes it forget the earlier ones."""
        self._seconds[address] = () if seconds is None else (*self._seconds.get(address, ()), seconds)[-WINDOW:]

    def seconds(self, address: str) -> float | None:
        """Its round trip; None while it does not answer, or has not been asked yet."""
        return min(self._seconds.get(address, ()), default=None)

    def rank(self) -> bool:
        """After every candidate was measured: choose. True when another one is dialled from now on."""
        before = self.current
        hints = self.candidates[len(self._configured) :]
        answering = self._answering(self._configured) or self._answering(hints)
        if answering:
            # Of equals the first in the configuration.
            best = min(answering, key=lambda each: answering[each])
            quickest, now = answering[best], answering.get(before)
            if now is None or (quickest < now * QUICKER_SHARE and quickest < now - QUICKER_SECONDS):
                self.current = best
        return self.current != before

    def _answering(self, addresses: Sequence[str]) -> dict[str, float]:
        """Those that answer, with their round trips."""
        return {each: seconds for each in addresses if (seconds := self.seconds(each)) is not None}


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
