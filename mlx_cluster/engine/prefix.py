"""The index of the prefix cache: which entries exist, what a new prompt can reuse, what has to go. Pure.

Owns: names of entries, hits, least-recently-used eviction by bytes and age. The engine is the only authority: it tells
all stages the same ``store``, ``load`` and ``evict``, in the order of the headers, so an entry that this index knows is
there when a header that loads it arrives.
Does not own: the keys and values themselves (``model.prefix`` on every stage).
Invariant: the bytes of entries in memory never exceed ``max_bytes``, those on the disk ``disk_max_bytes``; a hit leaves
at least one token of the prompt to compute.

Stages with a disk write every entry there. What goes from their memory for room or by age is then still known here, as
long as it fits the disk, and comes back to memory when it is loaded.

A radix tree over blocks of token ids, one root per salt (tenants never see each other's entries). Where every cache of
the model can be cut (``can_trim``) any common prefix is a hit; otherwise only a whole entry is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class RowCost:
    """What a row takes on one stage, as that stage measured it, and whether its caches can be cut.

    ``budget_bytes`` is what the stage has for all rows together; None is no bound.
    """

    bytes_per_position: int
    fixed_bytes: int
    can_trim: bool
    budget_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_bytes`` on one stage; an entry of n positions costs ``fixed_bytes + n * bytes_per_position`` there.

    ``disk_max_bytes`` on its disk, 0 without one.
    """

    max_bytes: int
    bytes_per_position: int
    fixed_bytes: int = 0
    ttl_seconds: float = 3600.0
    min_tokens: int = 32
    can_trim: bool = True
    disk_max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """The first ``length`` positions of ``entry`` are those of the prompt."""

    entry: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What the stages must be told: keep a row's caches as ``entry``, then forget ``evict``."""

    entry: int
    evict: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Node:
    """A point in the tree. ``ends`` are the entries whose last whole block it is, with the tokens that follow it."""

    parent: _Node | None = None
    block: tuple[int, ...] = ()
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    ends: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Entry:
    id: int
    salt: str
    length: int
    num_bytes: int
    used_at: float
    node: _Node
    digest: bytes


class PrefixIndex:
    """See the module. Every method takes ``now`` in seconds of one monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self.num_evicted = 0  # for room or by age; entries that a longer one replaced are not counted
        self._roots: dict[str, _Node] = {}
        self._entries: dict[int, _Entry] = {}
        self._resident: dict[int, None] = {}  # in memory, in order of last use: the first is the oldest
        self._on_disk: dict[int, None] = {}  # only there, in the same order
        self._disk_bytes = 0  # of these
        self._next_id = 0

    def __len__(self) -> int:
        """Entries in memory."""
        return len(self._resident)

    @property
    def num_on_disk(self) -> int:
        """Entries that are only there."""
        return len(self._on_disk)

    def lookup(self, salt: str, tokens: Sequence[int], now: float) -> Hit | None:
        """The longest reusable prefix of ``tokens``, or None when there is none of ``min_tokens`` or more."""
        root = self._roots.get(salt)
        if root is None:
            return None
        usable = len(tokens) - 1
        find = self._longest_common if self.limits.can_trim else self._longest_whole
        hit = find(root, tuple(tokens), usable)
        if hit is None or hit.length < self.limits.min_tokens:
            return None
        self._touch(hit.entry, now)
        return hit

    def store(self, salt: str, tokens: Sequence[int], now: float) -> Stored | None:
        """A name for the caches of exactly ``tokens``; None when they are there already, too short, or too large.

        Entries that the new one makes superfluous (it starts with all of their tokens) go, as do the oldest ones until
        it fits.
        """
        tokens = tuple(tokens)
        num_bytes = self.limits.fixed_bytes + len(tokens) * self.limits.bytes_per_position
        if len(tokens) < self.limits.min_tokens or num_bytes > self.limits.max_bytes:
            return None
        path, rest = self._walk(salt, tokens)
        node = path[-1]
        if self._is_covered(node, tokens, len(path) - 1, rest):
            return None
        superfluous = self._prefixes_of(path, tokens) if self.limits.can_trim else []
        evicted = [entry for entry in superfluous if entry in self._resident]
        for entry in superfluous:
            self._remove(entry)
        evicted += self.expire(now)
        evicted += self._make_room(num_bytes)
        entry_id = self._insert(salt, tokens, num_bytes, now)
        self._enter_memory(entry_id)
        return Stored(entry_id, tuple(evicted))

    def restore(self, salt: str, tokens: Sequence[int], now: float) -> bool:
        """All stages have these on their disks, from before. False when they are known, too short or too large."""
        tokens = tuple(tokens)
        num_bytes = self.limits.fixed_bytes + len(tokens) * self.limits.bytes_per_position
        if len(tokens) < self.limits.min_tokens or num_bytes > min(self.limits.max_bytes, self.limits.disk_max_bytes):
            return False
        path, rest = self._walk(salt, tokens)
        if self._is_covered(path[-1], tokens, len(path) - 1, rest):
            return False
        self._enter_disk(self._insert(salt, tokens, num_bytes, now))
        return True

    def digest(self, entry: int) -> bytes:
        """The name of its files; empty where stages have no disk."""
        return self._entries[entry].digest

    def fetch(self, entry: int) -> tuple[bytes, tuple[int, ...]]:
        """Have an entry in memory: what to read from the disk (nothing when it is there), and what goes for it."""
        if entry in self._resident:
            return b"", ()
        known = self._entries[entry]
        self._leave(entry)  # first, or making room could push it off the disk
        evicted = self._make_room(known.num_bytes)
        self._enter_memory(entry)
        return known.digest, tuple(evicted)

    def expire(self, now: float) -> list[int]:
        """Entries that nobody used for ``ttl_seconds``: gone from the index, to be evicted on the stages.

        Asked before every header, so it looks no further than the first entry that is young enough. On the disk entries
        do not age.
        """
        oldest = now - self.limits.ttl_seconds
        gone = []
        while self._resident and self._entries[first := next(iter(self._resident))].used_at < oldest:
            gone.append(self._evict(first))
        return gone

    def forget(self, entry: int) -> bool:
        """A stage does not have this entry: nobody may use it any more. True when it was known."""
        if entry not in self._entries:
            return False
        self._remove(entry)
        return True

    # -- reading the tree -------------------------------------------------------------------------------

    def _walk(self, salt: str, tokens: tuple[int, ...]) -> tuple[list[_Node], tuple[int, ...]]:
        """The nodes of all whole blocks that are there (root first), and what follows the last of them."""
        path = [self._roots.setdefault(salt, _Node())]
        at = 0
        while (child := path[-1].children.get(tokens[at : at + BLOCK_TOKENS])) is not None:
            path.append(child)
            at += BLOCK_TOKENS
        return path, tokens[at:]

    def _longest_common(self, root: _Node, tokens: tuple[int, ...], usable: int) -> Hit | None:
        node, at = root, 0
        while (child := node.children.get(tokens[at : at + BLOCK_TOKENS])) is not None:
            node, at = child, at + BLOCK_TOKENS
        rest = tokens[at:]
        best_length, best = 0, None
        for end, tail in node.ends.items():
            if (common := _common(tail, rest)) >= best_length:
                best_length, best = common, end
        for block, child in node.children.items():
            if (common := _common(block, rest)) > best_length or best is None:
                best_length, best = common, next(_ends_below(child))
        if best is None:
            return None
        return Hit(best, min(at + best_length, usable))

    def _longest_whole(self, root: _Node, tokens: tuple[int, ...], usable: int) -> Hit | None:
        node: _Node | None = root
        at, best = 0, None
        while node is not None:
            for end, tail in node.ends.items():
                length = at + len(tail)
                if length <= usable and tokens[at:length] == tail and (best is None or length > best.length):
                    best = Hit(end, length)
            node = node.children.get(tokens[at : at + BLOCK_TOKENS])
            at += BLOCK_TOKENS
        return best

    def _is_covered(self, node: _Node, tokens: tuple[int, ...], depth: int, rest: tuple[int, ...]) -> bool:
        """Whether some entry holds all of these tokens already (the very same ones, where entries cannot be cut)."""
        if not self.limits.can_trim:
            return rest in node.ends.values()
        if any(_common(tail, rest) == len(rest) for tail in node.ends.values()):
            return True
        return any(_common(block, rest) == len(rest) for block in node.children)

    def _prefixes_of(self, path: Sequence[_Node], tokens: tuple[int, ...]) -> list[int]:
        """Entries that are whole prefixes of these tokens."""
        return [
            end
            for depth, node in enumerate(path)
            for end, tail in node.ends.items()
            if tokens[depth * BLOCK_TOKENS : depth * BLOCK_TOKENS + len(tail)] == tail
        ]

    # -- changing it --------------------------------------------------------------------------------------

    def _insert(self, salt: str, tokens: tuple[int, ...], num_bytes: int, now: float) -> int:
        node, at = self._roots.setdefault(salt, _Node()), 0
        while at + BLOCK_TOKENS <= len(tokens):
            block = tokens[at : at + BLOCK_TOKENS]
            node = node.children.setdefault(block, _Node(node, block))
            at += BLOCK_TOKENS
        name = digest(salt, tokens) if self.limits.disk_max_bytes else b""
        entry = _Entry(self._next_id, salt, len(tokens), num_bytes, now, node, name)
        self._next_id += 1
        node.ends[entry.id] = tokens[at:]
        self._entries[entry.id] = entry
        return entry.id

    def _make_room(self, num_bytes: int) -> list[int]:
        """Entries that leave memory, the oldest first, so that these bytes fit."""
        evicted = []
        while self.num_bytes + num_bytes > self.limits.max_bytes:
            evicted.append(self._evict(next(iter(self._resident))))
        return evicted

    def _evict(self, entry: int) -> int:
        """Out of memory; onto the disk, where there is one."""
        self.num_evicted += 1
        if not self._entries[entry].digest:
            return self._remove(entry)
        self._leave(entry)
        self._enter_disk(entry)
        return entry

    def _enter_memory(self, entry: int) -> None:
        self._resident[entry] = None
        self.num_bytes += self._entries[entry].num_bytes

    def _enter_disk(self, entry: int) -> None:
        self._on_disk[entry] = None
        self._disk_bytes += self._entries[entry].num_bytes
        while self._disk_bytes > self.limits.disk_max_bytes:
            self._remove(next(iter(self._on_disk)))

    def _leave(self, entry: int) -> None:
        if entry in self._resident:
            del self._resident[entry]
            self.num_bytes -= self._entries[entry].num_bytes
        elif entry in self._on_disk:
            del self._on_disk[entry]
            self._disk_bytes -= self._entries[entry].num_bytes

    def _remove(self, entry_id: int) -> int:
        self._leave(entry_id)
        entry = self._entries.pop(entry_id)
        node = entry.node
        del node.ends[entry_id]
        while node.parent is not None and not node.ends and not node.children:
            del node.parent.children[node.block]
            node = node.parent
        if node.parent is None and not node.ends and not node.children:
            self._roots.pop(entry.salt, None)
        return entry_id

    def _touch(self, entry_id: int, now: float) -> None:
        self._entries[entry_id].used_at = now
        place = self._resident if entry_id in self._resident else self._on_disk
        del place[entry_id]
        place[entry_id] = None


def digest(salt: str, tokens: Sequence[int]) -> bytes:
    """The name of an entry's files, the same on all stages and in every epoch."""
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(len(salt.encode()).to_bytes(4, "little") + salt.encode())
    hashed.update(array("Q", tokens).tobytes())
    return hashed.digest()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _ends_below(node: _Node) -> Iterator[int]:
    """Entries at or below a node; every node has one."""
    yield from node.ends
    for child in node.children.values():
        yield from _ends_below(child)
