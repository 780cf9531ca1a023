"""Who waits for a row, and who gets the next one. Pure: time is an argument.

Owns: the bound of the queue, its order (priority classes that age, weighted fairness between tenants inside a class),
patience, who makes room when the queue is full, and the measured rate from which ``Retry-After`` is told.
Does not own: rows and memory (``engine.scheduler``), what a key may ask for (``gateway.keys``).
Invariants: whoever was let in leaves exactly once, by ``pop``, ``remove``, ``expire`` or as the one that ``push``
returns; ``peek`` names what ``pop`` gives at the same time; nobody waits for ever while others are popped.

Order. Resumed work first: it was admitted once already, and the bound, its class and its patience do not count again.
Then the class with the highest priority, where a class that was not served for a while counts one higher for every
``ageing_seconds``. The *class* ages, not each sequence: otherwise whoever sent a thousand sequences early would age
past everybody else, and a flood would beat fairness. Inside a class it is start-time fair queueing (Goyal, Vin and
Cheng, 1996): a tenant's tag moves on by the tokens that it was admitted with over its weight; the lowest tag is next.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mlx_cluster.errors import Overloaded
from mlx_cluster.request import SequenceRequest

# What is told before anything was measured, and the bounds of what is told at all (the SDKs obey up to a minute).
UNMEASURED_RETRY_SECONDS = 2.0
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
# How far back the rate of admission is measured.
RATE_MEMORY_SECONDS = 30.0
# Tenants of one class that wait for nothing, but had more than others lately.
MAX_DEBTORS = 512


@dataclass(frozen=True, slots=True)
class Share:
    """What one tenant is entitled to: its weight against others, and how many of its sequences may wait."""

    weight: float = 1.0
    max_waiting: int | None = None


class Waiter(Protocol):
    """What can wait; ``engine.sequence.SequenceState`` is one."""

    @property
    def id(self) -> int: ...

    @property
    def request(self) -> SequenceRequest: ...


T = TypeVar("T", bound=Waiter)


@dataclass(slots=True)
class _Line(Generic[T]):
    """One tenant in one class: first in, first out. ``tag`` is the virtual time at which its next one starts."""

    tag: float
    waiters: OrderedDict[int, T] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Class(Generic[T]):
    """All who wait with one priority. ``unserved_since`` is when it was last served, or came to be."""

    priority: int
    unserved_since: float
    virtual: float = 0.0
    size: int = 0
    lines: dict[str, _Line[T]] = field(default_factory=dict)

    def rank(self, now: float, ageing_seconds: float) -> tuple[int, int]:
        return (self.priority + math.floor((now - self.unserved_since) / ageing_seconds), self.priority)

    def next_tenant(self) -> str:
        """The tenant with the lowest tag; between equals, whoever's first one came first."""
        waiting = [(line.tag, next(iter(line.waiters)), tenant) for tenant, line in self.lines.items() if line.waiters]
        return min(waiting)[2]

    def forget_settled(self) -> None:
        """Drop tenants that wait for nothing and owe nothing, and the oldest debts when they are too many.

        So that keys nobody uses any more, or a new one for every request, take no memory.
        """
        if len(self.lines) <= 2 * self.size + MAX_DEBTORS:
            return
        debtors = [t for t, line in self.lines.items() if not line.waiters and line.tag > self.virtual]
        kept = set(debtors[-MAX_DEBTORS // 2 :])
        self.lines = {t: line for t, line in self.lines.items() if line.waiters or t in kept}


@dataclass(slots=True)
class _Rate:
    """Admissions per second of waiting, both forgotten exponentially."""

    measured_at: float = 0.0
    busy_seconds: float = 0.0
    admissions: float = 0.0

    def advance(self, now: float, *, busy: bool) -> None:
        elapsed = max(0.0, now - self.measured_at)
        keep = math.exp(-elapsed / RATE_MEMORY_SECONDS)
        self.busy_seconds = self.busy_seconds * keep + (elapsed if busy else 0.0)
        self.admissions *= keep
        self.measured_at = now

    def seconds_each(self) -> float | None:
        """Seconds between two admissions while somebody waits; None until one was seen."""
        if self.admissions < 0.5 or self.busy_seconds <= 0:
            return None
        return self.busy_seconds / self.admissions


class WaitingQueue(Generic[T]):
    """A bounded queue of sequences. ``shares`` names the tenants that are not like everybody else."""

    def __init__(
        self, max_waiting: int, shares: Mapping[str, Share] | None = None, *, ageing_seconds: float = 15.0
    ) -> None:
        self._max_waiting = max_waiting
        self._shares = dict(shares or {})
        self._ageing_seconds = ageing_seconds
        self._front: OrderedDict[int, T] = OrderedDict()
        self._classes: dict[int, _Class[T]] = {}
        self._members: dict[int, T] = {}  # everybody but the front
        self._holding: dict[str, int] = {}  # tenant → how many of its wait, but the front's
        self._deadlines: list[tuple[float, int]] = []
        self._rate = _Rate()

    def __len__(self) -> int:
        return len(self._front) + len(self._members)

    def __contains__(self, waiter_id: int) -> bool:
        return waiter_id in self._members or waiter_id in self._front

    def __iter__(self) -> Iterator[T]:
        """Everybody who waits, in no order that means anything."""
        yield from self._front.values()
        yield from self._members.values()

    # -- in ---------------------------------------------------------------------------------------------

    def push(self, waiter: T, now: float, *, room: int = 0) -> T | None:
        """Let a new one in, at the end of its tenant's line. Raises ``Overloaded`` when it may not wait.

        ``room`` is how many could be popped at once: they count beyond the bound. Returns whoever had to make room.
        Resumed work (``emitted``) always gets in, before all new work.
        """
        if waiter.request.emitted:
            self._front[waiter.id] = waiter
            return None
        self._measure(now)
        tenant = waiter.request.tenant
        share = self._share(tenant)
        if share.max_waiting is not None and self._holding.get(tenant, 0) >= share.max_waiting + room:
            raise Overloaded(
                f"{self._holding.get(tenant, 0)} sequences of this key are waiting already (its max_waiting is "
                f"{share.max_waiting}): come back later, or raise it in api_gateway.keys",
                retry_after_seconds=self.retry_after_seconds(now),
            )
        evicted: T | None = None
        if len(self._members) >= self._max_waiting + room:
            evicted = self._makes_room_for(waiter)
            if evicted is None:
                raise self.overloaded(now)
            self.remove(evicted.id, now)
        self._enter(waiter, now)
        return evicted

    def push_front(self, waiter: T) -> None:
        """Put back one that had a row (it was preempted): before everybody, whatever the bound."""
        self._front[waiter.id] = waiter
        self._front.move_to_end(waiter.id, last=False)

    def _enter(self, waiter: T, now: float) -> None:
        request = waiter.request
        found = self._classes.get(request.priority)
        if found is None:
            found = self._classes[request.priority] = _Class(request.priority, now)
        line = found.lines.get(request.tenant)
        if line is None:
            line = found.lines[request.tenant] = _Line(found.virtual)
        elif not line.waiters:
            line.tag = max(line.tag, found.virtual)
        line.waiters[waiter.id] = waiter
        found.size += 1
        self._members[waiter.id] = waiter
        self._holding[request.tenant] = self._holding.get(request.tenant, 0) + 1
        if request.queue_seconds is not None:
            heapq.heappush(self._deadlines, (now + request.queue_seconds, waiter.id))

    def overloaded(self, now: float) -> Overloaded:
        """The error of a full queue."""
        return Overloaded(
            f"{len(self._members)} sequences are waiting already (scheduler.max_queue is {self._max_waiting}); "
            "come back later or raise it",
            retry_after_seconds=self.retry_after_seconds(now),
        )

    # -- out --------------------------------------------------------------------------------------------

    def peek(self, now: float) -> T | None:
        """Who is next, or None when nobody waits."""
        if self._front:
            return next(iter(self._front.values()))
        found = self._next_class(now)
        if found is None:
            return None
        return next(iter(found.lines[found.next_tenant()].waiters.values()))

    def pop(self, now: float) -> T:
        """Take out who is next. Raises ``IndexError`` when nobody waits."""
        if self._front:
            return self._front.popitem(last=False)[1]
        self._measure(now)
        found = self._next_class(now)
        if found is None:
            raise IndexError("pop from an empty queue")
        tenant = found.next_tenant()
        line = found.lines[tenant]
        waiter = next(iter(line.waiters.values()))
        found.virtual = line.tag
        line.tag += _tokens(waiter.request) / self._share(tenant).weight
        found.unserved_since = now
        self._leave(waiter)
        self._rate.admissions += 1
        return waiter

    def remove(self, waiter_id: int, now: float | None = None) -> T | None:
        """Take one out, wherever it stands; None when it does not wait."""
        front = self._front.pop(waiter_id, None)
        if front is not None:
            return front
        waiter = self._members.get(waiter_id)
        if waiter is not None:
            if now is not None:
                self._measure(now)
            self._leave(waiter)
        return waiter

    def expire(self, now: float) -> list[T]:
        """Take out everybody whose patience is over."""
        expired: list[T] = []
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._members):
            _, waiter_id = heapq.heappop(self._deadlines)
            waiter = self._members.get(waiter_id)
            if waiter is not None:
                self._measure(now)
                self._leave(waiter)
                expired.append(waiter)
        return expired

    @property
    def next_expiry(self) -> float | None:
        """When ``expire`` has work at the earliest; an early guess is possible, a late one is not."""
        return self._deadlines[0][0] if self._deadlines else None

    def settle(self, request: SequenceRequest, unused_tokens: int) -> None:
        """Give a tenant back what an admitted sequence did not use of what it was charged with."""
        found = self._classes.get(request.priority)
        line = found.lines.get(request.tenant) if found is not None else None
        if found is not None and line is not None:
            line.tag = max(found.virtual, line.tag - unused_tokens / self._share(request.tenant).weight)

    def _leave(self, waiter: T) -> None:
        request = waiter.request
        found = self._classes[request.priority]
        del found.lines[request.tenant].waiters[waiter.id]
        found.size -= 1
        del self._members[waiter.id]
        left = self._holding[request.tenant] - 1
        if left:
            self._holding[request.tenant] = left
        else:
            del self._holding[request.tenant]
        if not found.size:
            del self._classes[request.priority]  # nobody competes any more: old debts are forgiven
        else:
            found.forget_settled()
        if len(self._deadlines) > 2 * len(self._members) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._members]
            heapq.heapify(self._deadlines)

    # -- who is next, and who makes room -------------------------------------------------------------------

    def _next_class(self, now: float) -> _Class[T] | None:
        return max(self._classes.values(), key=lambda c: c.rank(now, self._ageing_seconds), default=None)

    def _makes_room_for(self, newcomer: T) -> T | None:
        """Whom a full queue gives up for ``newcomer``: the last of whoever crowds it most, from the lowest class up.

        Nobody of a higher priority than the newcomer's, of its own tenant only what has a strictly lower one, and of
        another tenant only where it still holds, for its weight, at least as much as the newcomer's tenant then does:
        whoever keeps to its share keeps its place, and two tenants cannot push each other out in turns.
        """
        tenant, priority = newcomer.request.tenant, newcomer.request.priority
        then_holds = (self._holding.get(tenant, 0) + 1) / self._share(tenant).weight
        for found in sorted(self._classes.values(), key=lambda c: c.priority):
            if found.priority > priority:
                return None
            crowding = [
                ((self._holding[other] - 1) / self._share(other).weight, next(reversed(line.waiters)), other)
                for other, line in found.lines.items()
                if line.waiters and (other != tenant or found.priority < priority)
            ]
            fair = [each for each in crowding if each[2] == tenant or each[0] >= then_holds]
            if fair:
                return self._members[max(fair)[1]]
        return None

    def _share(self, tenant: str) -> Share:
        return self._shares.get(tenant, _EVERYBODY)

    # -- the rate ---------------------------------------------------------------------------------------

    def retry_after_seconds(self, now: float) -> float:
        """How long a queue as long as this one takes to pass, at the rate of admission measured lately."""
        self._measure(now)
        each = self._rate.seconds_each()
        if each is None:
            return UNMEASURED_RETRY_SECONDS
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, each * (len(self) + 1)))

    def _measure(self, now: float) -> None:
        self._rate.advance(now, busy=bool(self._members))


_EVERYBODY = Share()


def _tokens(request: SequenceRequest) -> int:
    """What a sequence is charged with when it is admitted; what it does not use is settled at its end."""
    return len(request.prompt) + request.max_tokens
