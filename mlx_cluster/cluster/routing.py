"""Which replica of a model serves the next sequence. Pure: time and chance are arguments.

Owns: the routing policies, the book of each replica's running sequences, latency and failures, the ejection of one that
keeps failing and its slow return.
Does not own: which replicas exist and are ready (the cluster document and their drivers), the streams themselves.
Invariant: a replica that is offered is always chosen when it is the only one; ejection never leaves nobody.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

RoutingPolicy = Literal["round_robin", "least_connections", "least_latency", "random", "weighted", "prefix_affinity"]

# Sequences that begin with the same tokens go to the same replica; a shared system prompt is longer than this.
AFFINITY_TOKENS = 64
# With affinity, a replica takes no more than this multiple of the mean load: one hot prompt must not pile up.
AFFINITY_MAX_LOAD = 1.25
# Failures in a row until a replica is left alone, for how long at first and at most, and how long its return takes.
EJECT_AFTER = 3
EJECT_SECONDS = 5.0
EJECT_MAX_SECONDS = 120.0
READMIT_SECONDS = 30.0
READMIT_LEAST_WEIGHT = 0.1
# Weight of the newest first-token time in the mean that least_latency compares.
LATENCY_MEMORY = 0.2


@dataclass(frozen=True, slots=True)
class Replica:
    """A pipeline that is ready. ``weight`` is its share under ``weighted``: its planned throughput, any unit."""

    pipeline: str
    weight: float = 1.0


@dataclass(slots=True)
class _Book:
    running: int = 0
    latency_seconds: float | None = None
    failures: int = 0  # in a row
    ejections: int = 0  # since it last worked for a whole READMIT_SECONDS
    ejected_until: float = -math.inf
    latest: int = 0  # the router's count when it was last chosen, for fair turns


@dataclass(slots=True)
class Router:
    """One per model and gateway; as many books as the model has names of replicas. ``chance`` gives numbers in 0…1."""

    policy: RoutingPolicy
    chance: Callable[[], float]
    _books: dict[str, _Book] = field(default_factory=dict)
    _turn: int = 0

    def choose(self, replicas: Sequence[Replica], prompt: Sequence[int], tenant: str, now: float) -> Replica:
        """One of ``replicas``, which must not be empty; ``sent`` is to follow."""
        assert replicas, "a caller with no replica says so itself"
        books = {replica.pipeline: self._books.setdefault(replica.pipeline, _Book()) for replica in replicas}
        fit = [replica for replica in replicas if books[replica.pipeline].ejected_until <= now] or list(replicas)
        if len(fit) == 1:
            return fit[0]
        admitted = {replica.pipeline: _admitted(books[replica.pipeline], now) for replica in fit}
        # One that comes back takes a part of its turns only, whatever the policy would give it.
        willing = [r for r in fit if admitted[r.pipeline] >= 1 or self.chance() < admitted[r.pipeline]] or fit
        return self._by_policy(willing, books, prompt, tenant)

    def sent(self, pipeline: str) -> None:
        """A sequence goes there; exactly one ``ended`` must follow."""
        book = self._books.setdefault(pipeline, _Book())
        self._turn += 1
        book.running += 1
        book.latest = self._turn

    def first_token(self, pipeline: str, seconds: float) -> None:
        """How long a sequence waited for its first token."""
        book = self._books.setdefault(pipeline, _Book())
        old = book.latency_seconds
        book.latency_seconds = seconds if old is None else old + LATENCY_MEMORY * (seconds - old)

    def ended(self, pipeline: str, *, failed: bool, now: float) -> None:
        """A sequence is over. ``failed``: the replica broke it, not the client and not its own content."""
        book = self._books.setdefault(pipeline, _Book())
        book.running -= 1
        if not failed:
            book.failures = 0
            if now - book.ejected_until > READMIT_SECONDS:
                book.ejections = 0
            return
        book.failures += 1
        if book.failures >= EJECT_AFTER and book.ejected_until <= now:
            book.ejected_until = now + min(EJECT_MAX_SECONDS, EJECT_SECONDS * 2**book.ejections)
            book.ejections += 1
            book.failures = EJECT_AFTER - 1  # the first failure after its return sends it away again

    def snapshot(self, now: float) -> Mapping[str, Mapping[str, float | int | bool | None]]:
        """What an operator may see of each replica."""
        return {
            pipeline: {
                "running": book.running,
                "first_token_seconds": book.latency_seconds,
                "ejected": book.ejected_until > now,
                "admitted_share": _admitted(book, now) if book.ejected_until <= now else 0.0,
            }
            for pipeline, book in self._books.items()
        }

    # -- the policies ---------------------------------------------------------------------------------------

    def _by_policy(
        self, replicas: Sequence[Replica], books: Mapping[str, _Book], prompt: Sequence[int], tenant: str
    ) -> Replica:
        match self.policy:
            case "round_robin":
                return min(replicas, key=lambda r: books[r.pipeline].latest)
            case "least_connections":
                return min(replicas, key=lambda r: (books[r.pipeline].running / r.weight, books[r.pipeline].latest))
            case "least_latency":
                return min(replicas, key=lambda r: _expected_wait(books[r.pipeline]))
            case "random":
                return replicas[min(int(self.chance() * len(replicas)), len(replicas) - 1)]
            case "weighted":
                return self._weighted(replicas)
            case "prefix_affinity":
                return _by_affinity(replicas, books, prompt, tenant)

    def _weighted(self, replicas: Sequence[Replica]) -> Replica:
        at = self.chance() * sum(replica.weight for replica in replicas)
        for replica in replicas:
            at -= replica.weight
            if at < 0:
                return replica
        return replicas[-1]


def _admitted(book: _Book, now: float) -> float:
    """The share of its turns that a replica gets: all of them, or after an ejection a rising part."""
    since = now - book.ejected_until
    return 1.0 if since >= READMIT_SECONDS else max(READMIT_LEAST_WEIGHT, since / READMIT_SECONDS)


def _expected_wait(book: _Book) -> tuple[float, int, int]:
    """First one that was never tried, so that each has a figure; then the usual wait, longer with what runs there."""
    if book.latency_seconds is None:
        return (0.0, book.running, book.latest)
    return (book.latency_seconds * (1 + book.running), book.running, book.latest)


def _by_affinity(
    replicas: Sequence[Replica], books: Mapping[str, _Book], prompt: Sequence[int], tenant: str
) -> Replica:
    """Weighted rendezvous hashing over the prompt's beginning, past replicas that carry too much already.

    Whoever ranks first for a prompt stays first when others come and go: only the prompts of a replica that left move.
    Source: Thaler and Ravishankar 1998; weights by -w / ln(u).
    """
    key = repr((tenant, tuple(prompt[:AFFINITY_TOKENS])))

    def score(replica: Replica) -> float:
        digest = hashlib.blake2b(f"{replica.pipeline}\0{key}".encode(), digest_size=8).digest()
        unit = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
        return -replica.weight / math.log(unit)

    total = sum(books[replica.pipeline].running for replica in replicas) + 1
    weights = sum(replica.weight for replica in replicas)
    ranked = sorted(replicas, key=score, reverse=True)
    for replica in ranked:
        share = math.ceil(AFFINITY_MAX_LOAD * total * replica.weight / weights)
        if books[replica.pipeline].running < max(1, share):
            return replica
    return ranked[0]
