"""What is on the disk, what is on its way there, and what may not be said before it is.

Owns: the order of writes and of the words that depend on them. Does not own: the write itself (``cluster.stable``).
Invariant: at most one write is under way; a held word leaves only when a state at least as new as the one it speaks of
is on the disk.
"""

from __future__ import annotations

from mlx_cluster.cluster.election.messages import Body
from mlx_cluster.cluster.election.values import Durable

Words = tuple[str, Body, int]  # receiver, what, in which term


class Journal:
    def __init__(self, durable: Durable) -> None:
        self.on_disk = durable
        self.under_way: Durable | None = None
        self.changed = False  # since the last write began
        self._held: list[tuple[int, Words]] = []

    @property
    def is_quiet(self) -> bool:
        """The disk holds the state of this moment."""
        return not self.changed and self.under_way is None

    @property
    def wants_to_write(self) -> bool:
        return self.changed and self.under_way is None

    def begin(self, durable: Durable) -> None:
        self.under_way, self.changed = durable, False

    def hold(self, words: list[Words]) -> None:
        """Keep these until the state of this moment is on the disk."""
        last = self.under_way.sequence if self.under_way else self.on_disk.sequence
        needed = last + 1 if self.changed else last
        self._held += [(needed, one) for one in words]

    def done(self, sequence: int) -> list[Words] | None:
        """The write with this sequence is on the disk: what may now be said. None for a write that is not awaited."""
        if self.under_way is None or sequence != self.under_way.sequence:
            return None
        self.on_disk, self.under_way = self.under_way, None
        ready = [words for needed, words in self._held if needed <= sequence]
        self._held = [held for held in self._held if held[0] > sequence]
        return ready

    def forget_words(self) -> None:
        self._held.clear()
