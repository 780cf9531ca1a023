"""Situations in which a wrong rule shows at once: short worlds with chosen clocks, cuts and crashes.

Each trap is a function of a seed and an election; it raises ``Broken`` where the rule it is about is broken.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_cluster.cluster.election import events as ev
from mlx_cluster.cluster.election.machine import Election
from mlx_cluster.cluster.election.values import Durable
from tests.sim.checker import Broken
from tests.sim.world import SETTINGS, Node, World

New = Callable[[Durable, ev.Settings], Election]
Trap = Callable[..., None]


def settled(world: World) -> Node:
    """Run until there is a leader with a lease, and return it."""
    limit = world.now + 10 * SETTINGS.timeout_max_seconds
    while world.now < limit:
        if world.run(limit, lambda: bool(world.leaders())):
            world.run(world.now + SETTINGS.timeout_min_seconds)
            if world.leaders():
                return world.leaders()[0]
    raise Broken("no leader stays")


def others(world: World, *nodes: Node) -> list[Node]:
    return [n for n in world.nodes.values() if n not in nodes]


def watch(world: World, seconds: float) -> None:
    """Ask everybody every few milliseconds, and propose whatever can be proposed."""
    steps = int(seconds / 0.004)
    for _ in range(steps):
        world.run(world.now + 0.004)
        world.ask_everybody()


def fast_followers(seed: int, election: New = Election) -> None:
    """The leader's clock is as slow as it may be, the followers' as fast, and the leader is cut off."""
    world = World(seed, 3, 3, election=election)
    leader = settled(world)
    for node in world.nodes.values():
        local = world.clock(node)
        node.rate = 1 - SETTINGS.max_drift if node is leader else 1 + SETTINGS.max_drift
        node.offset = local - node.rate * world.now
        world.hand(node, ev.SetPriority(0.0 if node is leader else 1.0))
    watch(world, 1.2)
    for node in others(world, leader):
        world.weather.cut |= {(node.name, leader.name), (leader.name, node.name)}
    watch(world, 2.5)


def deaf_voter(seed: int, election: New = Election) -> None:
    """Leader and one voter do not hear each other, and it stands; the other hears both, crashes and comes back."""
    world = World(seed, 3, 3, election=election)
    leader = settled(world)
    deaf, hearing = others(world, leader)
    world.hand(deaf, ev.SetPriority(1.0))
    world.weather.cut |= {(leader.name, deaf.name), (deaf.name, leader.name)}
    watch(world, 2.0)
    for _ in range(6):
        watch(world, world.rng.uniform(0.2, 0.7))
        world.crash(hearing)
        world.boot(hearing)
    recovers(world)


def late_answers(seed: int, election: New = Election) -> None:
    """The leader is no longer heard, while answers to what it said before still come in."""
    world = World(seed, 3, 3, election=election)
    leader = settled(world)
    for node in others(world, leader):
        world.hand(node, ev.SetPriority(1.0))
        world.weather.lag[(node.name, leader.name)] = world.rng.uniform(0.5, 1.5)
    watch(world, 0.6)
    world.weather.cut |= {(leader.name, n.name) for n in others(world, leader)}
    watch(world, 2.5)
    recovers(world)


def late_heartbeats(seed: int, election: New = Election) -> None:
    """One voter is cut off from the leader and stands; what the leader says reaches the other one only after that."""
    world = World(seed, 3, 3, election=election)
    for _ in range(4):
        leader = settled(world)
        standing, other = others(world, leader)
        for node, priority in ((leader, 0.5), (standing, 1.0), (other, 0.0)):
            world.hand(node, ev.SetPriority(priority))
        world.weather.cut |= {(leader.name, standing.name), (standing.name, leader.name)}
        world.weather.lag[(leader.name, other.name)] = world.rng.uniform(0.7, 0.88)
        watch(world, 1.8)
        world.weather.lag.clear()
        world.weather.cut.clear()
    recovers(world)


def reborn_leader(seed: int, election: New = Election) -> None:
    """A leader restarts with a reset clock and leads again, while copies of its former heartbeats still arrive."""
    world = World(seed, 3, 3, election=election)
    leader = settled(world)
    leader.offset += 1000.0
    watch(world, 1.0)
    leader = settled(world)
    world.weather.doubled, world.weather.slow_seconds = 1.0, 5.0
    watch(world, 1.5)
    world.weather.doubled = 0.0
    world.crash(leader)
    world.boot(leader)
    for node in world.nodes.values():
        world.hand(node, ev.SetPriority(1.0 if node is leader else 0.0))
    watch(world, world.rng.uniform(2.5, 4.0))
    for node in others(world, leader):
        world.weather.cut |= {(leader.name, node.name), (node.name, leader.name)}
    watch(world, 3.0)
    recovers(world)


def contest(seed: int, election: New = Election) -> None:
    """Everybody stands at once, with disks of different speed."""
    world = World(seed, 5, 5, election=election)
    world.weather.slow_disk = 0.3
    for _ in range(4):
        leader = settled(world)
        for node in others(world, leader):
            world.hand(node, ev.SetPriority(1.0))
        world.crash(leader)
        watch(world, 1.6)
        world.boot(leader)
    recovers(world)


def recovers(world: World) -> None:
    world.heal()
    world.must_recover()


TRAPS = (fast_followers, deaf_voter, late_answers, late_heartbeats, reborn_leader, contest)
