"""Seeded histories: a world, and what is done to it.

``history(seed)`` runs one and raises ``Broken`` when an invariant does not hold. The same seed is the same history.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from mlx_cluster.cluster.election import events as ev
from mlx_cluster.cluster.election.machine import Election
from mlx_cluster.cluster.election.values import NOTHING, Durable
from tests.sim.checker import Broken
from tests.sim.world import SETTINGS, Node, World

MIN_EVENTS = 400


class Faults:
    """Draws what goes wrong next. Each history has its own mixture."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, world.rng
        kinds: list[tuple[Callable[[], None], float]] = [
            (self.crash, 3),
            (self.restart, 0.5),
            (self.pause, 2),
            (self.cut, 2),
            (self.deafen, 2),
            (self.isolate, 3),
            (self.mend, 0.5),
            (self.storm, 1),
            (self.calm, 1.5),
            (self.wall_jump, 0.5),
            (self.lose_disk, 0.8),
            (self.roll_back, 0.8),
            (self.add_voter, 1),
            (self.remove_voter, 1),
            (self.transfer, 1),
            (self.shift_priority, 0.3),
            (self.propose, 4),
            (self.order, 1),
        ]
        self.kinds = [kind for kind, _ in kinds]
        self.weights = [weight * self.rng.choice((0, 0.5, 1, 1, 3)) for _, weight in kinds]
        self.weights[self.kinds.index(self.propose)] += 1
        self.pace = self.rng.uniform(0.15, 0.6)
        self.stopped = False

    def go_on(self) -> None:
        """One fault now, the next one later."""
        if self.stopped:
            return
        fault = self.rng.choices(self.kinds, self.weights)[0]
        if self.world.trace is not None:
            self.world.say(f"-- {fault.__name__}")
        self.world.num_events += 1
        fault()
        self.world.ask_everybody()
        self.world.at(self.world.now + self.rng.expovariate(1 / self.pace), self.go_on)

    def ask(self) -> None:
        if not self.stopped:
            self.world.ask_everybody()
            self.world.at(self.world.now + self.rng.expovariate(3), self.ask)

    # -- picking ---------------------------------------------------------------------------------------

    def _open(self) -> list[Node]:
        """Nodes that faults may touch."""
        return [n for n in self.world.nodes.values() if n.protected_until <= self.world.now]

    def _running(self) -> list[Node]:
        return [n for n in self._open() if n.election is not None]

    def _leader_or_any(self, nodes: list[Node]) -> Node | None:
        leaders = [n for n in nodes if n.election is not None and n.election.leading is not None]
        if leaders and self.rng.random() < 0.5:
            return self.rng.choice(leaders)
        return self.rng.choice(nodes) if nodes else None

    # -- processes and disks -----------------------------------------------------------------------------

    def crash(self) -> None:
        node = self._leader_or_any(self._running())
        if node is not None:
            self.world.crash(node)
            self.world.at(self.world.now + self._downtime(), self._restart, node)

    def _downtime(self) -> float:
        return self.rng.choice((0.2, 1.5, 5.0, 15.0)) * self.rng.random()

    def _restart(self, node: Node) -> None:
        if node.election is None and node.protected_until <= self.world.now:
            self.world.boot(node)

    def restart(self) -> None:
        down = [n for n in self._open() if n.election is None]
        if down:
            self.world.boot(self.rng.choice(down))

    def pause(self) -> None:
        node = self._leader_or_any([n for n in self._running() if not n.paused])
        if node is not None:
            node.paused = True
            self.world.at(self.world.now + self.rng.choice((0.3, 1.2, 4.0)) * self.rng.random(), self._resume, node)

    def _resume(self, node: Node) -> None:
        if node.paused:
            self.world.resume(node)

    def wall_jump(self) -> None:
        self.rng.choice(self._open() or list(self.world.nodes.values())).wall += self.rng.choice(
            (-30.0, -2.0, 2.0, 30.0)
        )

    def lose_disk(self) -> None:
        """The disk is empty, or its state was seen to be torn or old: the voter id is gone with it."""
        node = self.rng.choice(self._open() or [None])
        if node is None or node.disk[-1].document is None or not self._may_lose(node):
            return
        self.world.crash(node)
        self.world.checker.lost.add(node.voter)
        self.world.blank_disk(node)
        self.world.at(self.world.now + self._downtime(), self._restart, node)

    def _may_lose(self, node: Node) -> bool:
        last = self.world.checker.last
        return last is not None and node.voter in last.everyone and self.world.checker.may_lose(node.voter)

    def roll_back(self) -> None:
        """A disk goes back in time unnoticed; one voter that knows better is there when its node starts again."""
        node = self.rng.choice(self._running() or [None])
        if node is None or node.disk[-1].document is None or not self._may_lose(node):
            return
        older = [d for d in node.disk[:-1] if d.document is not None and node.voter in d.document.voters]
        if not older:
            return
        back = self.rng.choice(older)
        assert back.document is not None
        knowing = [
            n
            for n in self._running()
            if n is not node
            and n.election is not None
            and not n.paused
            and n.voter in back.document.everyone
            and n.election.seen.get(node.voter, 0) > back.sequence
        ]
        if not knowing:
            return
        world, witness = self.world, self.rng.choice(knowing)
        world.checker.lost.add(node.voter)
        world.crash(node)
        node.disk = [back]
        window = SETTINGS.timeout_min_seconds / (1 - SETTINGS.max_drift)
        node.protected_until = witness.protected_until = world.now + window
        world.boot(node)
        world.at(node.protected_until, self._must_be_noticed, node, back.voter)

    def _must_be_noticed(self, node: Node, voter: str) -> None:
        if node.voter == voter:
            raise Broken(f"{voter} went back in time and was not found out")

    # -- network -----------------------------------------------------------------------------------------

    def _cut(self, links: set[tuple[str, str]]) -> None:
        cut, seconds = self.world.weather.cut, self.rng.choice((0.7, 3.0, 3.0, 6.0)) * self.rng.random()
        cut |= links
        self.world.at(self.world.now + seconds, self._mend, links)

    def _mend(self, links: set[tuple[str, str]]) -> None:
        self.world.weather.cut -= links

    def cut(self) -> None:
        """Some directions of some links."""
        names = list(self.world.nodes)
        num_links = self.rng.randint(1, len(names))
        self._cut({(self.rng.choice(names), self.rng.choice(names)) for _ in range(num_links)})

    def deafen(self) -> None:
        """One voter no longer hears the leader, and everybody else does."""
        running = self._running()
        for leader in running:
            if leader.election is not None and leader.election.leading is not None:
                self._cut({(leader.name, self.rng.choice(running).name)})

    def isolate(self) -> None:
        """A group of nodes hears nobody else, or is heard by nobody else, or both."""
        names = list(self.world.nodes)
        leader = self._leader_or_any(self._running())
        group = {self.rng.choice(names) if leader is None else leader.name}
        group |= set(self.rng.sample(names, self.rng.randint(0, len(names) // 2)))
        deaf, mute = self.rng.choice(((True, True), (True, True), (True, False), (False, True)))
        others = set(names) - group
        links = {(i, o) for i in group for o in others} if mute else set()
        self._cut(links | ({(o, i) for i in group for o in others} if deaf else set()))

    def mend(self) -> None:
        self.world.weather.cut.clear()

    def storm(self) -> None:
        weather = self.world.weather
        weather.loss = self.rng.choice((0.0, 0.05, 0.3))
        weather.doubled = self.rng.choice((0.0, 0.1))
        weather.slow = self.rng.choice((0.0, 0.1, 0.5))
        weather.slow_seconds = self.rng.choice((0.5, 3.0, 8.0))
        weather.slow_disk = self.rng.choice((0.0, 0.2, 0.8))
        weather.blind = self.rng.choice((0.0, 0.0, 0.1, 0.6))

    def calm(self) -> None:
        weather = self.world.weather
        weather.loss = weather.doubled = weather.slow = weather.slow_disk = weather.blind = 0.0

    # -- operators and clients -----------------------------------------------------------------------------

    def _idle_leader(self) -> Node | None:
        idle = [n for n in self.world.leaders() if n.election is not None and n.election.is_idle]
        return self.rng.choice(idle) if idle else None

    def add_voter(self) -> None:
        leader, last = self._idle_leader(), self.world.checker.last
        if leader is None or last is None or len(last.voters) >= 5:
            return
        spare = [n for n in self._running() if all(v.split(":")[0] != n.name for v in last.voters)]
        if not spare:
            return
        node = self.rng.choice(spare)
        if node.voter in last.retired:  # it was removed: it starts blank, as its agent would see to
            self.world.crash(node)
            self.world.blank_disk(node)
            self.world.boot(node)
        self.world.hand(leader, ev.AddVoter(node.voter, witness=self.rng.random() < 0.2))

    def remove_voter(self) -> None:
        leader, last, lost = self._idle_leader(), self.world.checker.last, self.world.checker.lost
        if leader is None or last is None or len(last.voters) <= 1:
            return
        voter = self.rng.choice(last.voters)
        left = [v for v in last.voters if v != voter]
        leads = [v for v in left if v not in last.witnesses and v not in lost]
        if leads and 2 * sum(v not in lost for v in left) > len(left):
            self.world.hand(leader, ev.RemoveVoter(voter))

    def transfer(self) -> None:
        leader, last = self._idle_leader(), self.world.checker.last
        if leader is not None and last is not None:
            self.world.hand(leader, ev.TransferTo(self.rng.choice(last.voters)))

    def shift_priority(self) -> None:
        for node in self._running():
            self.world.hand(node, ev.SetPriority(self.rng.random()))

    def propose(self) -> None:
        leaders = self.world.leaders()
        if leaders:
            stale = NOTHING if self.rng.random() < 0.05 else None
            self.world.propose(self.rng.choice(leaders), stale)

    def order(self) -> None:
        """Whoever believes that it leads repeats its orders."""
        for node in self.world.leaders():
            if node.election is not None and node.election.committed is not None:
                self.world.order(node, node.election.committed.version)


def world_of(
    seed: int, election: Callable[[Durable, ev.Settings], Election] = Election, world: type[World] = World
) -> World:
    draw = random.Random(f"shape {seed}")
    size = draw.choice((1, 2, 3, 3, 3, 3, 4, 5))
    return world(seed, size, size + draw.choice((0, 1, 1)), draw.random() < 0.25 and size > 1, election)


def history(seed: int, election: Callable[[Durable, ev.Settings], Election] = Election, trace: bool = False) -> World:
    """Run one history; raises ``Broken``. Returns the world as it is in the end."""
    world = world_of(seed, election)
    world.trace = [] if trace else None
    try:
        unfold(world)
    except Broken:
        if world.trace is not None:
            print("\n".join(world.trace))
        raise
    return world


def unfold(world: World) -> None:
    if not world.run(10 * SETTINGS.timeout_max_seconds, lambda: bool(world.leaders())):
        raise Broken("no first leader")
    faults = Faults(world)
    faults.go_on()
    faults.ask()
    enough = world.num_events + MIN_EVENTS
    world.run(1e9, lambda: world.num_events >= enough)
    faults.stopped = True
    world.heal()
    world.must_recover()
