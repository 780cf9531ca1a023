"""What the scheduler orders of the prefix cache: load with a row's first chunk; store and evict with any next header.

Owns: the orders that wait for a header, which entries were made of which row, and the count of what was reused.
Does not own: which entries exist and which go (``engine.prefix``).
Invariant: stores are planned before look-ups for the same header, so nothing loads an entry that the header evicts; a
row that broke on some stage leaves no entry behind; a tenant never begins with another one's entry.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_cluster.engine.prefix import Hit, PrefixIndex, digest
from mlx_cluster.engine.sequence import SequenceState
from mlx_cluster.microbatch import Load, Saved, Store


class PrefixBook:
    """One per scheduler; without an index it never orders anything. ``now`` is in seconds of the engine's clock."""

    def __init__(self, index: PrefixIndex | None) -> None:
        self._index = index
        self._keep: list[tuple[SequenceState, tuple[int, ...]]] = []
        self._store: list[Store] = []
        self._evict: list[int] = []
        self._num_hits = self._num_hit_tokens = self._num_disk_hits = 0

    def statistics(self) -> dict[str, int]:
        """What is kept, by the cost on the tightest stage, and what came of it since the engine began."""
        index = self._index
        return {
            "prefix_entries": len(index) if index is not None else 0,
            "prefix_bytes": index.num_bytes if index is not None else 0,
            "prefix_hits": self._num_hits,
            "prefix_hit_tokens": self._num_hit_tokens,
            "prefix_disk_entries": index.num_on_disk if index is not None else 0,
            "prefix_disk_hits": self._num_disk_hits,
            "prefix_evictions": index.num_evicted if index is not None else 0,
        }

    def restore(self, saved: Sequence[Sequence[Saved]], now: float) -> int:
        """What lies on the disks of all stages, by stage, can be used again; the first stage's have their tokens.

        Gives how many are new. The least recently used come first.
        """
        if self._index is None:
            return 0
        everywhere = set.intersection(*({entry.digest for entry in entries} for entries in saved))
        return sum(
            self._index.restore(entry.salt, entry.tokens, now)
            for entry in saved[0]
            if entry.digest in everywhere and entry.digest == digest(entry.salt, entry.tokens)
        )

    @property
    def has_orders(self) -> bool:
        return bool(self._store or self._evict)

    def num_reusable(self, sequence: SequenceState, now: float) -> int:
        """How many positions ``reuse`` would save."""
        hit = self._look_up(sequence, now)
        return hit.length if hit is not None else 0

    def reuse(self, sequence: SequenceState, now: float) -> tuple[Load, ...]:
        """Let a fresh row begin with the longest entry that fits, if any; the order to load it."""
        hit = self._look_up(sequence, now)
        if hit is None:
            return ()
        sequence.prefilled = sequence.cached = hit.length
        sequence.entry = hit.entry
        self._num_hits += 1
        self._num_hit_tokens += hit.length
        assert self._index is not None
        name, evicted = self._index.fetch(hit.entry)
        self._num_disk_hits += bool(name)
        self._evict += evicted  # a header evicts before it loads
        return (Load(sequence.row, hit.entry, hit.length, name),)

    def keep_prompt(self, sequence: SequenceState) -> None:
        """Its last chunk was sent: the next header finds exactly the prompt in the row's caches."""
        self._keep_tokens(sequence, sequence.tokens)

    def keep_conversation(self, sequence: SequenceState) -> None:
        """It ended: all but the last token, which was drawn and never computed."""
        self._keep_tokens(sequence, (*sequence.tokens, *sequence.emitted[:-1]))

    def disown(self, sequence: SequenceState) -> None:
        """Its row broke on some stage: so did every entry made of it, and the one it began with may be missing."""
        self._keep = [item for item in self._keep if item[0] is not sequence]
        self._store = [store for store in self._store if store.row != sequence.row]
        entries = sequence.kept if sequence.entry is None else [*sequence.kept, sequence.entry]
        self._evict += [entry for entry in entries if self._index is not None and self._index.forget(entry)]
        sequence.kept = []

    def leave(self, sequence: SequenceState) -> None:
        """Its row goes before its time: what was to be kept of it and has no order yet is not kept."""
        self._keep = [item for item in self._keep if item[0] is not sequence]

    def plan_stores(self, now: float) -> None:
        """Name what is to be kept, and what has to go for it."""
        if self._index is None:
            return
        self._evict += self._index.expire(now)
        for sequence, tokens in self._keep:
            stored = self._index.store(sequence.request.tenant, tokens, now)
            if stored is not None:
                name = self._index.digest(stored.entry)
                saved = Saved(name, sequence.request.tenant, tokens) if name else None
                self._store.append(Store(sequence.row, stored.entry, saved))
                sequence.kept.append(stored.entry)
                self._evict += stored.evict
        self._keep.clear()

    def take_orders(self) -> tuple[tuple[Store, ...], tuple[int, ...]]:
        """Stores and evictions for the header that leaves now."""
        orders = tuple(self._store), tuple(self._evict)
        self._store.clear()
        self._evict.clear()
        return orders

    def _look_up(self, sequence: SequenceState, now: float) -> Hit | None:
        if self._index is None or sequence.prefilled or not sequence.may_reuse:
            return None
        return self._index.lookup(sequence.request.tenant, sequence.tokens, now)

    def _keep_tokens(self, sequence: SequenceState, tokens: tuple[int, ...]) -> None:
        if self._index is not None:
            self._keep.append((sequence, tokens))
