"""Failures that other clusters are known for, and the situations that an operator brings about."""

from __future__ import annotations

import pytest

from mlx_cluster.cluster.election import events as ev
from mlx_cluster.cluster.election.messages import AppendReply, Message
from tests.sim.traps import others, settled
from tests.sim.world import SETTINGS, Node, World

SEEDS = range(8)
LONG = 10 * SETTINGS.timeout_max_seconds


def term_of(node: Node) -> int:
    assert node.election is not None
    return node.election.term


def leader_of(world: World) -> Node:
    (leader,) = world.leaders()
    return leader


def commit(world: World) -> str:
    """Propose at the leader and wait until it is committed."""
    body = world.propose(leader_of(world))
    assert world.run(world.now + LONG, lambda: world.checker.last is not None and world.checker.last.body == body)
    return body


@pytest.mark.parametrize("seed", SEEDS)
def test_a_restarted_leader_with_a_reset_clock_believes_in_no_old_lease(seed: int) -> None:
    world = World(seed, 3, 3)
    leader = settled(world)
    leader.offset += 1e6  # it has been up for long
    world.run(world.now + 2.0)
    term = term_of(leader)
    assert leader.election is not None
    last = leader.election.version
    late = [
        Message("sim", leader.election.era, n.voter, leader.voter, term, 99, AppendReply(world.clock(leader), last))
        for n in others(world, leader)
    ]
    world.crash(leader)
    world.boot(leader)
    assert world.clock(leader) < 1e5
    for node in others(world, leader):
        world.hand(node, ev.SetPriority(0.0))
    world.hand(leader, ev.SetPriority(1.0))
    again = settled(world)
    assert term_of(again) > term
    for message in late:  # answers to heartbeats of its former life, dated far in its future
        world.hand(leader, message)
    for node in others(world, leader):
        world.weather.cut |= {(node.name, leader.name), (leader.name, node.name)}
    world.run(world.now + 5.0)
    world.ask_everybody()
    assert leader.election is not None
    assert leader.election.answer(world.clock(leader)) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_delayed_message_does_not_flip_the_leader(seed: int) -> None:
    world = World(seed, 3, 3)
    old = settled(world)
    followers = others(world, old)
    for node in followers:  # what it says from here on arrives after its successor has settled
        world.weather.lag[(old.name, node.name)] = 6.0
    world.run(world.now + 0.5)
    world.weather.cut |= {(old.name, n.name) for n in followers} | {(n.name, old.name) for n in followers}
    world.run(world.now + 4.0)
    new = next(n for n in world.leaders() if n is not old)
    term = term_of(new)
    world.run(world.now + 4.0)  # now the old heartbeats are there
    assert all(n.election is not None and n.election.leader == new.voter for n in followers)
    world.heal()
    world.run(world.now + LONG)
    assert leader_of(world) is new or term_of(leader_of(world)) > term


@pytest.mark.parametrize("seed", SEEDS)
def test_a_joiner_never_dethrones_the_leader(seed: int) -> None:
    world = World(seed, 3, 4)
    leader, joiner = settled(world), world.nodes["n3"]
    term = term_of(leader)
    commit(world)
    world.hand(joiner, ev.SetPriority(1.0))
    world.run(world.now + LONG)
    world.hand(leader, ev.AddVoter(joiner.voter))
    world.run(world.now + LONG)
    assert joiner.election is not None
    assert joiner.election.is_voter
    assert leader_of(world) is leader
    assert term_of(leader) == term


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_with_a_new_disk_gets_its_seat_back_under_a_new_id_and_does_not_lead(seed: int) -> None:
    world = World(seed, 3, 3)
    leader = settled(world)
    body, victim = commit(world), others(world, settled(world))[0]
    lost = victim.voter
    world.crash(victim)
    world.checker.lost.add(lost)
    world.blank_disk(victim)
    world.boot(victim)
    world.hand(victim, ev.SetPriority(1.0))
    world.run(world.now + LONG)
    last = world.checker.last
    assert last is not None
    assert lost not in last.voters
    assert lost in last.retired
    assert victim.voter in last.voters
    assert not last.vacant
    assert last.body == body
    assert leader_of(world) is leader


@pytest.mark.parametrize(("size", "together"), [(3, False), (5, False), (5, True)])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_flapping_nodes_do_not_move_the_leader(seed: int, size: int, together: bool) -> None:
    world = World(seed, size, size)
    leader = settled(world)
    term, (first, second) = term_of(leader), others(world, leader)[:2]
    for _ in range(20):
        for nodes in [(first, second)] if together else [(first,), (second,)]:
            for node in nodes:
                world.crash(node)
            world.run(world.now + world.rng.uniform(0.0, 0.8))
            for node in nodes:
                world.boot(node)
            world.run(world.now + world.rng.uniform(1.2, 2.0))
    world.run(world.now + LONG)
    assert leader_of(world) is leader
    assert term_of(leader) == term


@pytest.mark.parametrize("seed", SEEDS)
def test_a_returning_node_with_a_higher_term_costs_no_other_leader(seed: int) -> None:
    world = World(seed, 3, 3)
    leader = settled(world)
    stray = others(world, leader)[0]
    world.crash(stray)
    assert stray.disk
    durable = stray.disk[-1]
    stray.disk.append(type(durable)(**{**_fields(durable), "term": durable.term + 5, "voted_for": None}))
    world.boot(stray)
    world.run(world.now + LONG)
    assert leader_of(world) is leader
    assert term_of(leader) > durable.term + 5


def _fields(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_nodes_and_a_witness_survive_either_node(seed: int) -> None:
    world = World(seed, 3, 3, witness=True)
    witness = world.nodes["n2"]
    for _ in range(3):
        leader = settled(world)
        other = next(n for n in others(world, leader) if n is not witness)
        world.weather.cut |= {(leader.name, other.name)}  # the newest document is on leader and witness only
        body = commit(world)
        world.crash(leader)
        world.weather.cut.clear()
        assert settled(world) is other
        assert world.checker.last is not None
        assert world.checker.last.body == body
        world.boot(leader)
        world.run(world.now + LONG)
    assert not any(voter == witness.voter for voter in world.checker.leaders.values())


def test_a_cluster_of_one_leads_at_once_and_survives_a_restart() -> None:
    world = World(1, 1, 1)
    node = world.nodes["n0"]
    world.run(world.now + 1.0)
    body = commit(world)
    world.crash(node)
    world.boot(node)
    world.run(world.now + 1.0)
    assert node.election is not None
    assert node.election.committed is not None
    assert node.election.committed.body == body
    assert node.election.answer(world.clock(node)) is node.election.committed


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hand_over_takes_less_than_a_time_out(seed: int) -> None:
    world = World(seed, 3, 3)
    leader = settled(world)
    target = others(world, leader)[1]
    world.hand(leader, ev.TransferTo(target.voter))
    assert world.run(world.now + SETTINGS.timeout_min_seconds / 2, lambda: world.leaders() == [target])
    world.run(world.now + LONG)
    assert leader_of(world) is target


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leader_that_slept_confirms_its_quorum_before_anything(seed: int) -> None:
    world = World(seed, 3, 3)
    leader = settled(world)
    assert leader.election is not None
    assert leader.election.is_confirmed()
    leader.paused = True
    for node in others(world, leader):  # everybody sleeps: nobody has been elected in between
        node.paused = True
    world.run(world.now + 60.0)
    world.resume(leader)
    assert leader.election.may_act
    assert not leader.election.is_confirmed()
    assert leader.election.answer(world.clock(leader)) is None
    for node in others(world, leader):
        world.resume(node)
    world.run(world.now + LONG)
    assert leader_of(world).election is not None
    assert all(n.election is not None and n.election.leader == leader_of(world).voter for n in world.nodes.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cut_off_leader_steps_down_and_its_orders_are_refused(seed: int) -> None:
    world = World(seed, 3, 3)
    old = settled(world)
    assert old.election is not None
    stale = old.election.version
    for node in others(world, old):
        world.weather.cut |= {(old.name, node.name), (node.name, old.name)}
    world.run(world.now + 6.0)
    assert not old.election.may_act
    new = leader_of(world)
    world.run(world.now + 1.0)
    for node in others(world, old):
        assert not node.agent.obeys(stale)
    assert new is not old


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rolling_restart_keeps_every_document(seed: int) -> None:
    world = World(seed, 3, 3)
    settled(world)
    for node in list(world.nodes.values()):
        body = commit(world)
        world.crash(node)
        world.run(world.now + 0.5)
        world.boot(node)
        settled(world)
        world.run(world.now + LONG)
        assert world.checker.last is not None
        assert world.checker.last.body == body


class TestForcedRecovery:
    def lose_the_majority(self, seed: int) -> tuple[World, Node, list[Node], str]:
        world = World(seed, 3, 3)
        survivor = settled(world)
        body = commit(world)
        world.run(world.now + 2.0)
        gone = others(world, survivor)
        for node in gone:
            world.crash(node)
        world.run(world.now + LONG)
        assert not world.leaders()
        return world, survivor, gone, body

    @pytest.mark.parametrize("seed", SEEDS)
    def test_one_voter_goes_on_alone_and_the_others_return_as_new_ones(self, seed: int) -> None:
        world, survivor, gone, body = self.lose_the_majority(seed)
        world.checker.founding_anew = True
        world.hand(survivor, ev.ForceNewCluster())
        world.run(world.now + LONG)
        world.checker.founding_anew = False
        assert leader_of(world) is survivor
        assert world.checker.last is not None
        assert world.checker.last.voters == (survivor.voter,)
        assert world.checker.last.body == body
        former = [node.voter for node in gone]
        for node in gone:
            world.boot(node)
        world.run(world.now + LONG)
        for node, before in zip(gone, former, strict=True):
            assert node.voter != before
            world.hand(survivor, ev.AddVoter(node.voter))
            world.run(world.now + LONG)
        assert len(world.checker.last.voters) == 3
        assert leader_of(world) is survivor

    @pytest.mark.parametrize("seed", SEEDS)
    def test_it_is_refused_while_another_voter_answers(self, seed: int) -> None:
        world, survivor, gone, _ = self.lose_the_majority(seed)
        assert survivor.election is not None
        era = survivor.election.era
        world.boot(gone[0])
        gone[0].paused = True  # it answers late, but it answers
        world.hand(survivor, ev.ForceNewCluster())
        world.run(world.now + 1.0)
        world.resume(gone[0])
        world.run(world.now + LONG)
        assert survivor.election.era == era
        assert world.checker.last is not None
        assert len(world.checker.last.voters) == 3
        assert world.leaders()
