"""Voters of several nodes under a virtual clock: a network that delivers a little later or not at all, and disks."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlx_cluster.cluster.election.events import BecomeLeader, Command, Committed, Retire, Settings
from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.values import Durable, Era, node_of
from mlx_cluster.cluster.stable import LostDisk
from mlx_cluster.cluster.voter import News, Standing, Voter

TIMING = Settings(heartbeat_seconds=0.5, timeout_min_seconds=1.5, timeout_max_seconds=3.0)
DELAY_SECONDS, WRITE_SECONDS = 0.005, 0.01


@dataclass(slots=True)
class Host:
    """One node: its disk outlives its voter. ``frozen`` takes nothing in, ``deaf`` hears nothing."""

    name: str
    world: Voters
    disk: Durable | None = None
    voter: Voter | None = None
    life: int = 0
    frozen: bool = False
    blind: bool = False
    news: list[News] = field(default_factory=list)
    eras: list[Era] = field(default_factory=list)
    backlog: list[Callable[[], None]] = field(default_factory=list)

    def send(self, message: Message) -> None:
        self.world.carry(self.name, message)

    def write(self, durable: Durable) -> None:
        life = self.life
        self.world.at(WRITE_SECONDS, lambda: self._written(durable, life))

    def tell(self, news: News, era: Era) -> None:
        self.news.append(news)
        self.eras.append(era)

    def _written(self, durable: Durable, life: int) -> None:
        if self.life == life and self.voter is not None:
            self.disk = durable
            voter = self.voter
            self.take(lambda: voter.written(durable, self.world.now))

    def take(self, work: Callable[[], None]) -> None:
        if self.frozen:
            self.backlog.append(work)
        else:
            work()

    @property
    def standing(self) -> Standing:
        assert self.voter is not None
        return self.voter.standing()

    def committed(self) -> list[str]:
        return [n.document.body for n in self.news if isinstance(n, Committed)]

    def led(self) -> list[int]:
        return [n.term for n in self.news if isinstance(n, BecomeLeader)]

    def retired(self) -> list[str]:
        return [n.reason for n in self.news if isinstance(n, Retire)]


class Voters:
    def __init__(self, names: Iterable[str], *, witness: str | None = None, seed: int = 1) -> None:
        self.now = 100.0
        self.rng = random.Random(seed)
        self.hosts = {name: Host(name, self) for name in names}
        self.witness = witness
        self.cut: set[str] = set()
        self._count = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, after: float, work: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + after, self._count, work))

    def boot(self, *names: str) -> None:
        for name in names or self.hosts:
            host = self.hosts[name]
            host.life += 1
            host.frozen = False
            host.voter = Voter(
                name,
                host.disk or LostDisk("new"),
                TIMING,
                host,
                cluster="c",
                nodes=[other for other in self.hosts if other != name],
                witnesses=[self.witness] if self.witness else [],
                fresh=lambda: f"{self.rng.getrandbits(32):08x}",
                chance=self.rng.random,
            )
            host.voter.start(self.now)

    def kill(self, name: str) -> None:
        host = self.hosts[name]
        host.voter, host.life = None, host.life + 1

    def freeze(self, name: str) -> None:
        self.hosts[name].frozen = True

    def thaw(self, name: str) -> None:
        host = self.hosts[name]
        host.frozen, backlog, host.backlog = False, host.backlog, []
        for work in backlog:
            work()

    def carry(self, sender: str, message: Message) -> None:
        receiver = node_of(message.receiver)
        if receiver in self.hosts and (sender in self.cut) == (receiver in self.cut):
            copy = Message.from_text(message.to_text())
            self.at(DELAY_SECONDS, lambda: self._deliver(receiver, copy))

    def _deliver(self, receiver: str, message: Message) -> None:
        host = self.hosts[receiver]
        voter = host.voter
        if voter is not None and not host.blind:
            host.take(lambda: voter.hear(message, self.now))

    def order(self, name: str, command: Command) -> list[str]:
        """The answers to a command, as they come."""
        answers: list[str] = []
        voter = self.hosts[name].voter
        assert voter is not None
        voter.order(command, self.now, answers.append)
        return answers

    def run(self, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass until ``done``; False when it is not done by then."""
        end = self.now + seconds
        while not done():
            timers = [(h.voter.timer, h) for h in self.hosts.values() if h.voter is not None and not h.frozen]
            next_timer = min((max(at, self.now) for at, _ in timers), default=end)
            next_event = self._heap[0][0] if self._heap else end
            if min(next_timer, next_event) >= end:
                self.now = end
                return done()
            if next_event <= next_timer:
                self.now, _, work = heapq.heappop(self._heap)
                work()
                continue
            self.now = next_timer
            host = min((max(at, 0.0), h.name, h) for at, h in timers)[2]
            assert host.voter is not None
            host.voter.wake(self.now, blind=host.blind)
        return True

    def leader(self) -> Host | None:
        """The host that may act in the highest term."""
        acting = [h for h in self.hosts.values() if h.voter is not None and not h.frozen and h.standing.may_act]
        return max(acting, key=lambda h: h.standing.term, default=None)
