"""A virtual world of voters: their clocks, disks, processes and network, all drawn from one seed.

Runs real ``Election`` objects by carrying out their effects. Faults are done to it by ``faults``; every step is shown
to the ``Checker``.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_cluster.cluster.election import events as ev
from mlx_cluster.cluster.election.machine import Election
from mlx_cluster.cluster.election.messages import Append, Message
from mlx_cluster.cluster.election.values import Durable, Version, node_of
from tests.sim.checker import Agent, Broken, Checker

SETTINGS = ev.Settings(heartbeat_seconds=0.45, timeout_min_seconds=1.0, timeout_max_seconds=2.0, max_drift=0.05)
FAST_SECONDS = ((0.002, 0.04), (0.0002, 0.002))
KNOCK_SECONDS = 0.7


@dataclass(slots=True)
class Node:
    """A machine: its disk outlives its process. ``rate`` and ``offset`` make its monotonic clock of the true time."""

    name: str
    rate: float
    offset: float
    wall: float = 0.0
    disk: list[Durable] = field(default_factory=list)
    disks: int = 0
    election: Election | None = None
    life: int = 0
    timer: int = 0
    paused: bool = False
    backlog: list[ev.Event] = field(default_factory=list)
    agent: Agent = field(default_factory=Agent)
    protected_until: float = -math.inf

    @property
    def voter(self) -> str:
        return self.disk[-1].voter


@dataclass(slots=True)
class Weather:
    """How bad the network and the disks are at the moment."""

    loss: float = 0.0
    doubled: float = 0.0
    slow: float = 0.0  # the share of messages that take up to ``slow_seconds``
    slow_seconds: float = 3.0
    slow_disk: float = 0.0
    blind: float = 0.0  # the share of timers that find the intake of messages held up
    cut: set[tuple[str, str]] = field(default_factory=set)
    lag: dict[tuple[str, str], float] = field(default_factory=dict)  # everything on this link takes so much longer


class World:
    """``size`` voters of ``num_nodes`` nodes; the rest are spare."""

    def __init__(
        self,
        seed: int | str,
        size: int,
        num_nodes: int,
        witness: bool = False,
        election: Callable[[Durable, ev.Settings], Election] = Election,
    ) -> None:
        self.rng = random.Random(seed)
        self.new_election = election
        self.now = 0.0
        self.num_events = 0  # that a voter has taken, and faults
        self.checker = Checker()
        self.weather = Weather()
        self.fast = self.rng.choice(FAST_SECONDS)
        self.through_text = self.rng.random() < 0.02  # some histories send every message through its JSON form
        self.trace: list[str] | None = None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self.nodes = {f"n{i}": self._new_node(f"n{i}") for i in range(num_nodes)}
        self._all = list(self.nodes.values())
        for node in self._all:
            self.blank_disk(node)
            self.boot(node)
        voters = tuple(node.voter for node in self._all[:size])
        first = ev.Bootstrap(voters, "b0", witnesses=voters[-1:] if witness else ())
        self.hand(self._all[0], first)

    def _new_node(self, name: str) -> Node:
        return Node(name, rate=self._rate(), offset=self.rng.uniform(0, 1000))

    def _rate(self) -> float:
        drift = SETTINGS.max_drift
        return 1 + self.rng.choice((-drift, drift, self.rng.uniform(-drift, drift)))

    # -- time ----------------------------------------------------------------------------------------

    def at(self, when: float, what: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, what, arguments))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Go on until ``done`` (True) or until the time has come (False)."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, what, arguments = heapq.heappop(heap)
            what(*arguments)
            if done is not None and done():
                return True
        self.now = max(self.now, until)
        return False

    def clock(self, node: Node) -> float:
        """What the process on this node takes for the time."""
        return node.offset + node.rate * self.now

    # -- processes -----------------------------------------------------------------------------------

    def blank_disk(self, node: Node) -> None:
        node.disks += 1
        node.disk = [Durable("sim", f"{node.name}:{node.disks}")]
        node.agent = Agent()

    def boot(self, node: Node) -> None:
        """A machine that starts has a clock that starts too."""
        node.life += 1
        node.paused, node.backlog = False, []
        node.rate, node.offset = self._rate(), self.rng.uniform(0, 10) - self.now
        node.election = self.new_election(node.disk[-1], SETTINGS)
        self.say(f"{node.name} boots as {node.voter}")
        self.carry_out(node, node.election.start(self.clock(node), self.rng.random()))
        self.at(self.now + KNOCK_SECONDS, self._knock, node, node.life)

    def crash(self, node: Node) -> None:
        node.life += 1
        node.election, node.paused, node.backlog = None, False, []
        self.say(f"{node.name} crashes")

    def resume(self, node: Node) -> None:
        node.paused, backlog, node.backlog = False, node.backlog, []
        self.say(f"{node.name} resumes")
        life = node.life
        for event in backlog:
            if node.life == life:
                self.hand(node, event)

    def hand(self, node: Node, event: ev.Event) -> None:
        election = node.election
        if election is None:
            return
        if node.paused:
            node.backlog.append(event)
            return
        self.num_events += 1
        effects = election.step(self.clock(node), event, self.rng.random())
        if self.trace is not None:
            self.say(f"{node.name} {election.role} {election.term} {election.version}: {event} → {effects}")
        if effects:
            self.carry_out(node, effects)
        if election.leading is not None and election.document is not None:
            self.checker.leads(election.era, election.term, election.voter, election.document)

    def carry_out(self, node: Node, effects: tuple[ev.Effect, ...]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is ev.Send:
                self._send(node, effect.message)
            elif kind is ev.SetTimer:
                node.timer += 1
                if effect.at < math.inf:
                    due = max(self.now, (effect.at - node.offset) / node.rate + 1e-9)
                    self.at(due, self._timer, node, node.timer, node.life)
            elif kind is ev.Persist:
                low, high = (0.05, 1.5) if self.rng.random() < self.weather.slow_disk else self.fast
                self.at(self.now + self.rng.uniform(low, high), self._written, node, node.life, effect.durable)
                if effect.durable.document is not None:
                    self.checker.saw(effect.durable.document)
            elif kind is ev.Committed:
                self._committed(node, effect)
            elif kind is ev.Retire:
                self._retire(node, effect.reason)

    def _timer(self, node: Node, timer: int, life: int) -> None:
        if node.life == life and (node.timer == timer or node.paused):
            self.hand(node, ev.Blind() if self.rng.random() < self.weather.blind else ev.Tick())

    def _written(self, node: Node, life: int, durable: Durable) -> None:
        """A write that was under way when its process died has reached the disk, or has not."""
        if node.life != life and (node.life != life + 1 or node.election or self.rng.random() < 0.5):
            return
        if node.voter != durable.voter or node.disk[-1].sequence >= durable.sequence:
            return
        node.disk.append(durable)
        if durable.document is not None:
            self.checker.is_stored(durable.voter, durable.document)
        if node.life == life:
            self.hand(node, ev.Persisted(durable.sequence))

    def _committed(self, node: Node, effect: ev.Committed) -> None:
        election = node.election
        assert election is not None
        leads = election.leading is not None
        before = self.checker.last
        self.checker.acts_on(election.voter, effect.document, leads)
        if self.checker.last is not before:
            self.ask_everybody()  # the moment when another's lease would be seen to lie
        if leads:
            self.order(node, effect.document.version)

    def _retire(self, node: Node, reason: str) -> None:
        self.say(f"{node.name} retires {node.voter}: {reason}")
        self.crash(node)
        self.blank_disk(node)
        self.at(self.now + self.rng.uniform(0.05, 0.5), self._boot_if_down, node, node.life)

    def _boot_if_down(self, node: Node, life: int) -> None:
        if node.life == life and node.election is None:
            self.boot(node)

    def _knock(self, node: Node, life: int) -> None:
        if node.life != life or node.election is None:
            return
        last = self.checker.last
        if not node.election.is_voter and (node.disks > 1 or (last is not None and node.voter in last.voters)):
            self.hand(node, ev.Knock(tuple(self.nodes)))
        self.at(self.now + KNOCK_SECONDS, self._knock, node, life)

    # -- network -------------------------------------------------------------------------------------

    def _send(self, source: Node, message: Message) -> None:
        if type(message.body) is Append and message.body.document is not None:
            self.checker.saw(message.body.document)
        if self.through_text:
            message = Message.from_text(message.to_text())
        target = self.nodes[node_of(message.receiver)]
        for delay in self.delays(source, target):
            self.at(self.now + delay, self.hand, target, message)

    def delays(self, source: Node, target: Node) -> list[float]:
        """When copies of what is sent now arrive: none, one or two of them."""
        rng, weather = self.rng, self.weather
        if source.protected_until > self.now and target.protected_until > self.now:
            return [rng.uniform(*self.fast)]
        if (source.name, target.name) in weather.cut or (weather.loss and rng.random() < weather.loss):
            return []
        delays = [rng.uniform(*self.fast) + weather.lag.get((source.name, target.name), 0.0)]
        if weather.slow and rng.random() < weather.slow:
            delays = [rng.uniform(0, weather.slow_seconds)]
        if weather.doubled and rng.random() < weather.doubled:
            delays.append(rng.uniform(0, weather.slow_seconds))
        return delays

    def order(self, source: Node, version: Version) -> None:
        """A leader tells all agents to act on a document."""
        for target in self._all:
            for delay in self.delays(source, target):
                self.at(self.now + delay, self._obey, target, target.voter, version)

    def _obey(self, node: Node, voter: str, version: Version) -> None:
        if node.voter == voter and node.election is not None and not node.paused and node.agent.obeys(version):
            self.checker.obeyed(node.agent, version)

    # -- what clients see -------------------------------------------------------------------------------

    def ask_everybody(self) -> None:
        """Whoever believes in a lease answers."""
        for node in self._all:
            if node.election is not None and not node.paused:
                document = node.election.answer(self.clock(node))
                if document is not None:
                    self.checker.answers(node.voter, document)

    def leaders(self) -> list[Node]:
        """Nodes whose voter may act."""
        return [n for n in self._all if n.election is not None and not n.paused and n.election.may_act]

    def propose(self, node: Node, base: Version | None = None) -> str:
        """A new document from what this node has committed."""
        election = node.election
        assert election is not None
        assert election.committed is not None
        self._count += 1
        body = f"b{self._count}"
        self.checker.made_from[body] = election.committed.body
        self.hand(node, ev.Propose(body, election.committed.version if base is None else base))
        return body

    def say(self, line: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:9.3f} {line}")

    # -- the end ----------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No fault from here on."""
        self.weather = Weather()
        for node in self._all:
            if node.paused:
                self.resume(node)
            if node.election is None:
                self.boot(node)

    def must_recover(self) -> None:
        """After the last fault there is a leader within ten longest time-outs, and it gets a document committed."""
        limit = 10 * SETTINGS.timeout_max_seconds
        if not self.run(self.now + limit, lambda: bool(self.leaders())):
            raise Broken(f"no leader {limit} s after the last fault")
        wanted: list[str] = []

        def is_committed() -> bool:
            last = self.checker.last
            if wanted and last is not None and last.body == wanted[-1]:
                return True
            for node in self.leaders():
                if node.election is not None and node.election.is_idle:
                    wanted.append(self.propose(node))
            return False

        if not self.run(self.now + limit, is_committed):
            raise Broken(f"nothing can be committed {limit} s after a leader was there")
