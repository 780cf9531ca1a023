"""The voter's life under a virtual clock: what ``voting`` runs in threads, without any."""

from __future__ import annotations

import pytest

from mlx_cluster.cluster.election.events import Bootstrap, Committed, ForceNewCluster, Propose, TransferTo
from mlx_cluster.cluster.election.values import Version, node_of
from mlx_cluster.cluster.voter import MAX_VOTERS
from tests.unit.cluster.voters import TIMING, Host, Voters


def founded(*names: str, witness: str | None = None, seed: int = 1) -> tuple[Voters, Host]:
    """A cluster of these nodes (and a witness), founded by the first one; the world and its leader."""
    world = Voters([*names, witness] if witness else names, witness=witness, seed=seed)
    world.boot()
    first = Bootstrap(tuple(world.hosts[n].standing.voter for n in names), "b0")
    assert world.order(names[0], first) == [""]
    size = len(names) + (witness is not None)
    assert world.run(
        20, lambda: (h := world.leader()) is not None and h.standing.is_idle and len(h.standing.voters) == size
    )
    leader = world.leader()
    assert leader is not None
    return world, leader


def propose(world: Voters, leader: Host, body: str) -> None:
    document = next(n.document for n in reversed(leader.news) if isinstance(n, Committed))
    assert world.order(leader.name, Propose(body, document.version)) == [""]


def test_the_founder_leads_at_once_and_a_proposal_reaches_everybody() -> None:
    world, leader = founded("0", "1", "2")
    assert world.now - 100.0 < 0.5, "nobody waits for a time-out at the first start"
    assert leader.name == "0"
    propose(world, leader, "b1")
    assert world.run(2, lambda: all(h.committed()[-1:] == ["b1"] for h in world.hosts.values()))
    assert all(
        h.disk is not None and h.disk.document is not None and h.disk.document.body == "b1"
        for h in world.hosts.values()
    )


def test_one_node_alone_leads_and_keeps_its_term_over_restarts() -> None:
    world, leader = founded("0")
    propose(world, leader, "b1")
    assert world.run(1, lambda: leader.committed()[-1] == "b1")
    term = leader.standing.term
    world.kill("0")
    world.boot("0")
    assert world.run(1, lambda: world.leader() is not None), "nobody else could have been promised anything"
    assert leader.standing.term == term + 1
    assert leader.committed()[-1] == "b1"


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_leader_is_replaced_within_three_seconds(seed: int) -> None:
    world, leader = founded("0", "1", "2", seed=seed)
    world.run(5)
    world.kill(leader.name)
    died = world.now
    assert world.run(10, lambda: world.leader() is not None)
    assert world.now - died < TIMING.timeout_max_seconds + 0.5
    successor = world.leader()
    assert successor is not None
    assert successor.committed()[-1] == "b0", "the document under its own term"
    world.boot(leader.name)
    world.run(10)
    assert world.leader() is successor, "who comes back does not dethrone"
    assert leader.standing.leader == successor.standing.voter


def test_a_frozen_leader_finds_another_one_in_office_and_never_acts_again_in_its_term() -> None:
    world, leader = founded("0", "1", "2")
    world.run(3)
    old_term = leader.standing.term
    world.freeze(leader.name)
    assert world.run(10, lambda: world.leader() is not None)
    successor = world.leader()
    assert successor is not None
    propose(world, successor, "b1")
    world.run(2)
    world.thaw(leader.name)
    assert leader.voter is not None
    leader.voter.wake(world.now, blind=False)
    assert not leader.standing.is_confirmed, "it must not declare anybody dead before a majority has answered"
    assert world.run(5, lambda: leader.committed()[-1] == "b1")
    assert leader.led() == [old_term]
    assert world.leader() is successor


def test_a_short_freeze_costs_no_term() -> None:
    world, leader = founded("0", "1", "2")
    world.run(3)
    term = leader.standing.term
    world.freeze(leader.name)
    world.run(1.2)
    world.thaw(leader.name)
    assert world.run(3, lambda: leader.standing.is_confirmed)
    world.run(10)
    assert world.leader() is leader
    assert leader.standing.term == term


def test_a_held_up_intake_neither_dethrones_its_leader_nor_raises_a_term() -> None:
    world, leader = founded("0", "1", "2")
    world.run(3)
    term = leader.standing.term
    leader.blind = True
    world.run(8)
    leader.blind = False
    world.run(5)
    assert world.leader() is leader, "its heartbeats went on"
    assert {h.standing.term for h in world.hosts.values()} == {term}
    follower = next(h for h in world.hosts.values() if h is not leader)
    follower.blind = True
    world.run(8)
    assert {h.standing.term for h in world.hosts.values()} == {term}, "a follower that hears nothing blames nobody"


def test_a_minority_knows_that_it_is_one() -> None:
    world, leader = founded("0", "1", "2")
    world.run(3)
    world.cut = {leader.name}
    assert world.run(10, lambda: not leader.standing.may_act)
    assert not leader.standing.has_quorum
    assert world.run(10, lambda: (h := world.leader()) is not None and h is not leader)


def test_two_nodes_and_a_witness_outlive_one_of_them_and_the_witness_never_leads() -> None:
    world, leader = founded("0", "1", witness="witness")
    other = world.hosts["1" if leader.name == "0" else "0"]
    assert node_of(leader.standing.witnesses[0]) == "witness"
    propose(world, leader, "b1")
    world.run(1)
    world.kill(leader.name)
    assert world.run(10, lambda: world.leader() is not None)
    assert world.leader() is other
    assert other.committed()[-1] == "b1"
    witness = world.hosts["witness"]
    assert witness.disk is not None
    assert witness.disk.document is not None
    assert witness.disk.document.body == "b1"
    world.boot(leader.name)
    world.kill(other.name)
    assert world.run(20, lambda: world.leader() is leader)


def test_two_nodes_without_a_witness_stop_deciding_and_say_so() -> None:
    world, leader = founded("0", "1")
    world.kill("1")
    assert world.run(10, lambda: not leader.standing.has_quorum)
    world.boot("1")
    assert world.run(10, lambda: world.leader() is not None)


def test_a_lost_disk_returns_under_a_new_id_and_gets_its_seat_back() -> None:
    world, leader = founded("0", "1", "2")
    world.run(2)
    old = world.hosts["2"].standing.voter
    world.kill("2")
    world.hosts["2"].disk = None
    world.boot("2")
    new = world.hosts["2"].standing.voter
    assert new != old
    assert world.run(20, lambda: new in leader.standing.voters and leader.standing.is_idle)
    assert old not in leader.standing.voters
    assert world.run(5, lambda: world.hosts["2"].committed()[-1:] == ["b0"])


def test_a_node_that_was_not_there_at_the_founding_gets_a_seat() -> None:
    world = Voters(["0", "1", "2"])
    world.boot("0", "1")
    world.order("0", Bootstrap(tuple(world.hosts[n].standing.voter for n in ("0", "1")), "b0"))
    assert world.run(5, lambda: world.leader() is not None)
    world.boot("2")
    assert world.run(10, lambda: world.hosts["2"].standing.is_voter and world.hosts["2"].committed() == ["b0"])


def test_no_more_than_seven_nodes_vote_and_the_witness_besides() -> None:
    names = [str(i) for i in range(MAX_VOTERS + 1)]
    world = Voters([*names, "witness"], witness="witness")
    world.boot()
    world.order("0", Bootstrap(tuple(world.hosts[n].standing.voter for n in names[:MAX_VOTERS]), "b0"))
    assert world.run(20, lambda: (h := world.leader()) is not None and len(h.standing.voters) == MAX_VOTERS + 1)
    world.run(5)
    leader = world.leader()
    assert leader is not None
    assert {node_of(v) for v in leader.standing.voters} == {*names[:MAX_VOTERS], "witness"}


def test_a_new_founding_is_refused_while_another_voter_answers() -> None:
    world, leader = founded("0", "1", "2")
    world.run(2)
    world.kill("1")
    world.kill(leader.name)
    world.run(5)
    world.boot("1")
    world.run(0.1)
    answers = world.order("2", ForceNewCluster())
    assert world.run(20, lambda: bool(answers))
    assert "still answers" in answers[0]


def test_a_new_founding_goes_on_alone_and_the_lost_ones_join_it_under_new_ids() -> None:
    world, leader = founded("0", "1", "2")
    propose(world, leader, "b1")
    world.run(2)
    world.kill("0")
    world.kill("1")
    left = world.hosts["2"]
    world.run(5)
    assert not left.standing.has_quorum
    answers = world.order("2", ForceNewCluster())
    assert world.run(20, lambda: answers == [""])
    assert left.standing.era.number == 2
    assert left.committed()[-1] == "b1"
    world.boot("0", "1")
    assert world.run(40, lambda: len(left.standing.voters) == 3 and left.standing.is_idle)
    assert all("founded anew" in world.hosts[n].retired()[0] for n in ("0", "1"))
    assert all(world.hosts[n].eras[-1].number == 2 for n in ("0", "1"))


def test_a_hand_over_needs_no_time_out() -> None:
    world, leader = founded("0", "1", "2")
    world.run(2)
    target = next(h for h in world.hosts.values() if h is not leader)
    assert world.order(leader.name, TransferTo(target.standing.voter)) == [""]
    begun = world.now
    assert world.run(2, lambda: world.leader() is target)
    assert world.now - begun < 0.3


def test_a_proposal_from_an_older_document_is_refused_with_the_reason() -> None:
    world, leader = founded("0", "1", "2")
    (reason,) = world.order(leader.name, Propose("b9", Version(0, 1)))
    assert "make it again" in reason
    follower = next(h for h in world.hosts.values() if h is not leader)
    (reason,) = world.order(follower.name, Propose("b9", Version(0, 1)))
    assert "does not lead" in reason
