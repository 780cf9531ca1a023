"""One voter at a time: what it says, what it writes first, and what it refuses. Whole clusters are in ``tests/sim``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.election import clock
from mlx_cluster.cluster.election import events as ev
from mlx_cluster.cluster.election import messages as ms
from mlx_cluster.cluster.election.machine import Election, Role
from mlx_cluster.cluster.election.strategy import Candidate, HandOvers, Pin, Strategy, priorities
from mlx_cluster.cluster.election.values import Document, Durable, Era, Version, node_of

SETTINGS = ev.Settings(heartbeat_seconds=0.5, timeout_min_seconds=2.0, timeout_max_seconds=4.0)
ERA = Era(1, "a:1")
TRIO = Document(Version(1, 3), "plans", ("a:1", "b:1", "c:1"))


class Voter:
    """An election whose effects are kept; its disk finishes when the test says so."""

    def __init__(self, voter: str = "a:1", document: Document | None = TRIO, now: float = 0.0, **durable: Any) -> None:
        values = {"era": ERA, "term": document.version.term if document else 0, "sequence": 4, **durable}
        self.election = Election(Durable("home", voter, document=document, **values), SETTINGS)
        self.now = now
        self.take(self.election.start(now, 0.5))

    def take(self, effects: tuple[ev.Effect, ...]) -> None:
        self.effects = effects
        self.timer = next((e.at for e in effects if isinstance(e, ev.SetTimer)), getattr(self, "timer", math.inf))
        self.writes = [*getattr(self, "writes", []), *(e.durable for e in effects if isinstance(e, ev.Persist))]

    def step(self, event: ev.Event, now: float | None = None) -> Voter:
        self.now = self.now if now is None else now
        self.take(self.election.step(self.now, event, 0.5))
        return self

    def hear(self, sender: str, body: ms.Body, term: int, now: float | None = None, sequence: int = 1) -> Voter:
        return self.step(ms.Message("home", ERA, sender, self.election.voter, term, sequence, body), now)

    def synced(self) -> Voter:
        return self.step(ev.Persisted(self.writes[-1].sequence))

    def tick(self) -> Voter:
        return self.step(ev.Tick(), self.timer)

    def sent(self, kind: type[Any]) -> list[ms.Message]:
        return [e.message for e in self.effects if isinstance(e, ev.Send) and isinstance(e.message.body, kind)]

    def got(self, kind: type[Any]) -> list[Any]:
        return [e for e in self.effects if isinstance(e, kind)]


def awake(voter: str = "a:1", document: Document | None = TRIO, **durable: Any) -> Voter:
    """Past the time after a start in which it holds still."""
    one = Voter(voter, document, **durable)
    while one.now < SETTINGS.timeout_min_seconds:
        one.tick()
    return one


def standing(**durable: Any) -> Voter:
    """``a`` is a candidate in term 2, its vote on the disk."""
    one = awake(**durable)
    while one.election.role is not Role.ASKING:
        one.tick()
    return one.hear("b:1", ms.VoteReply(True, True), term=2).synced()


def leading(document: Document = TRIO) -> Voter:
    """``a`` leads term 2, its document committed with ``b``."""
    one = standing(document=document)
    one.hear("b:1", ms.VoteReply(True, False), term=2).synced()
    version = one.election.version
    one.hear("b:1", ms.AppendReply(one.now, version), term=2)
    one.hear("c:1", ms.AppendReply(one.now, version), term=2)
    assert one.election.is_idle
    return one


# -- arithmetic ------------------------------------------------------------------------------------


def test_versions_are_ordered_by_term_then_index() -> None:
    assert Version(1, 9) < Version(2, 1) < Version(2, 2)


def test_a_majority_is_of_both_sets_while_the_voters_change() -> None:
    change = replace(TRIO, voters=("a:1", "b:1"), previous=TRIO.voters)
    assert not change.is_majority({"a:1", "c:1"})
    assert not TRIO.is_majority({"a:1"})
    assert change.is_majority({"a:1", "b:1"})
    assert change.everyone == ("a:1", "b:1", "c:1")
    assert change.reached({"a:1": 5.0, "b:1": 3.0, "c:1": 4.0}) == 3.0
    assert TRIO.reached({"a:1": 5.0}) == -math.inf


def test_the_node_of_a_voter_is_its_first_part() -> None:
    assert node_of("mini1:7f") == node_of("mini1:") == "mini1"


def test_a_lease_ends_before_the_fastest_promise_seen_from_the_slowest_leader() -> None:
    drift = SETTINGS.max_drift
    assert SETTINGS.lease_seconds / (1 - drift) <= SETTINGS.timeout_min_seconds / (1 + drift)


@pytest.mark.parametrize("times", [(1.2, 2.0, 4.0), (0.5, 4.0, 4.0), (0.0, 2.0, 4.0)])
def test_settings_that_cannot_work_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="time-out"):
        ev.Settings(*times)


def test_the_clock_of_promises_goes_on() -> None:
    first = clock.now()
    assert clock.now() >= first > 0


# -- messages --------------------------------------------------------------------------------------

NAMES = st.text(max_size=8)
VERSIONS = st.builds(Version, st.integers(0, 2**40), st.integers(0, 2**40))
ID_LISTS = st.lists(NAMES, max_size=3).map(tuple)
DOCUMENTS = st.builds(Document, VERSIONS, st.text(), ID_LISTS, ID_LISTS, ID_LISTS, ID_LISTS, ID_LISTS)
TIMES = st.floats(allow_nan=False, allow_infinity=False)
BODIES = st.one_of(
    st.builds(ms.VoteRequest, VERSIONS, st.booleans(), st.booleans()),
    st.builds(ms.VoteReply, st.booleans(), st.booleans(), st.none() | DOCUMENTS),
    st.builds(ms.Append, TIMES, VERSIONS, st.none() | DOCUMENTS),
    st.builds(ms.AppendReply, st.none() | TIMES, VERSIONS),
    st.builds(ms.HandOver),
    st.builds(ms.RollCall),
    st.builds(ms.RollCallReply, st.integers(0, 2**60)),
    st.builds(ms.Join),
    st.builds(ms.Dismissal),
)
ERAS = st.builds(Era, st.integers(0, 9), NAMES)


@given(st.builds(ms.Message, NAMES, ERAS, NAMES, NAMES, st.integers(0, 2**40), st.integers(0, 2**60), BODIES))
def test_a_message_survives_its_text(message: ms.Message) -> None:
    assert ms.Message.from_text(message.to_text()) == message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "Join"}', "null", '{"kind": "__class__"}'])
def test_what_is_no_message_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an election message"):
        ms.Message.from_text(text)


# -- the disk comes first ------------------------------------------------------------------------------


def test_a_vote_leaves_only_when_it_is_on_the_disk() -> None:
    one = awake().hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2)
    assert not one.sent(ms.VoteReply)
    assert (one.writes[-1].term, one.writes[-1].voted_for) == (2, "b:1")
    one.synced()
    assert [m.body for m in one.sent(ms.VoteReply)] == [ms.VoteReply(True, False)]


def test_a_write_that_is_not_awaited_releases_nothing() -> None:
    one = awake().hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2)
    one.step(ev.Persisted(one.writes[-1].sequence - 1))
    assert not one.sent(ms.VoteReply)


def test_one_write_is_under_way_and_the_next_one_takes_all_changes_since() -> None:
    one = awake().hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2)
    newer = TRIO.next(3, body="newer")
    one.hear("c:1", ms.Append(0.0, TRIO.version, newer), term=3)
    assert len(one.writes) == 1
    one.synced()
    assert not one.sent(ms.AppendReply)  # the state that it speaks of is only now being written
    assert (one.writes[-1].term, one.writes[-1].voted_for, one.writes[-1].document) == (3, None, newer)
    one.synced()
    assert [m.body for m in one.sent(ms.AppendReply)] == [ms.AppendReply(0.0, newer.version)]
    assert not one.sent(ms.VoteReply)  # of a term that is over


def test_a_candidate_counts_its_own_vote_after_its_disk() -> None:
    one = awake()
    while one.election.role is not Role.ASKING:
        one.tick()
    one.hear("b:1", ms.VoteReply(True, True), term=2)
    assert one.election.role is Role.CANDIDATE
    assert not one.sent(ms.VoteRequest)
    one.hear("b:1", ms.VoteReply(True, False), term=2)
    assert one.election.role is Role.CANDIDATE
    one.synced()
    assert one.election.role is Role.LEADER


def test_a_leader_counts_itself_after_its_disk() -> None:
    one = standing()
    one.hear("b:1", ms.VoteReply(True, False), term=2)
    one.hear("b:1", ms.AppendReply(one.now, one.election.version), term=2)
    assert not one.got(ev.Committed)
    one.synced()
    assert [c.document.version for c in one.got(ev.Committed)] == [Version(2, 4)]
    assert one.got(ev.BecomeLeader) == [ev.BecomeLeader(2)]


# -- votes --------------------------------------------------------------------------------------------


def test_who_has_an_older_document_gets_no_vote_but_the_newer_document() -> None:
    one = awake()
    for pre in (True, False):
        one.hear("b:1", ms.VoteRequest(Version(1, 2), pre=pre), term=2)
        if not pre:
            one.synced()
        assert [m.body for m in one.sent(ms.VoteReply)] == [ms.VoteReply(False, pre, TRIO)]


def test_a_refused_candidate_takes_the_newer_document_and_stands_again_soon() -> None:
    one, newer = standing(), TRIO.next(1, body="newer")
    one.hear("c:1", ms.VoteReply(False, False, newer), term=2)
    assert one.election.document == newer
    assert one.writes[-1].document == newer
    assert one.timer <= one.now + SETTINGS.heartbeat_seconds


def test_a_pre_vote_changes_nothing_on_the_disk() -> None:
    one = awake().hear("b:1", ms.VoteRequest(TRIO.version, pre=True), term=7)
    assert [(m.term, m.body) for m in one.sent(ms.VoteReply)] == [(7, ms.VoteReply(True, True))]
    assert not one.writes
    assert one.election.term == 1


def test_one_vote_in_a_term() -> None:
    one = awake().hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2).synced()
    one.hear("c:1", ms.VoteRequest(TRIO.version, pre=False), term=2)
    assert [m.body for m in one.sent(ms.VoteReply)] == [ms.VoteReply(False, False)]
    one.hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2)
    assert [m.body for m in one.sent(ms.VoteReply)] == [ms.VoteReply(True, False)]


def test_who_has_heard_a_leader_votes_for_nobody_else_until_its_promise_ends() -> None:
    one = awake().hear("b:1", ms.Append(0.0, TRIO.version), term=1)
    heard = one.now
    ask = ms.VoteRequest(TRIO.version, pre=True)
    assert not one.hear("c:1", ask, 2, heard + 1.9).sent(ms.VoteReply)[0].body.granted
    assert not one.hear("c:1", replace(ask, pre=False), 2, heard + 1.95).effects
    assert one.election.term == 1
    assert one.hear("b:1", ask, 2, heard + 1.96).sent(ms.VoteReply)[0].body.granted  # but for that leader itself
    assert one.hear("c:1", ask, 2, heard + 2.0).sent(ms.VoteReply)[0].body.granted


def test_a_candidate_whom_the_leader_asked_to_stand_is_not_kept_waiting() -> None:
    one = awake().hear("b:1", ms.Append(0.0, TRIO.version), term=1)
    one.hear("c:1", ms.VoteRequest(TRIO.version, pre=False, handed_over=True), term=2).synced()
    assert one.sent(ms.VoteReply)[0].body.granted


def test_a_hand_over_of_another_term_is_ignored() -> None:
    one = awake().hear("b:1", ms.HandOver(), term=0)
    assert one.election.role is Role.FOLLOWER
    one.hear("b:1", ms.HandOver(), term=1).synced()
    assert all(m.body.handed_over and not m.body.pre for m in one.sent(ms.VoteRequest))
    assert {m.receiver for m in one.sent(ms.VoteRequest)} == {"b:1", "c:1"}


def test_a_witness_and_a_node_without_seat_never_stand() -> None:
    for document in (replace(TRIO, witnesses=("a:1",)), replace(TRIO, voters=("b:1", "c:1"))):
        one = awake(document=document)
        for _ in range(5):
            one.tick()
        assert one.election.role is Role.FOLLOWER
        assert not one.writes


def test_higher_priority_stands_sooner_and_nobody_before_the_shortest_time_out() -> None:
    for chance in (0.0, 0.5, 0.99):
        first, second, third = (SETTINGS.delay_seconds(priority, chance) for priority in (1.0, 0.5, 0.0))
        assert SETTINGS.timeout_min_seconds <= first < second < third <= SETTINGS.timeout_max_seconds


@pytest.mark.parametrize("change", [{"cluster": "other"}, {"receiver": "a:2"}, {"era": Era(1, "b:1")}])
def test_messages_for_somebody_else_are_dropped(change: dict[str, Any]) -> None:
    one = awake()
    message = ms.Message("home", ERA, "b:1", "a:1", 2, 1, ms.VoteRequest(TRIO.version, pre=True))
    assert one.step(message).sent(ms.VoteReply)
    assert not one.step(replace(message, **change)).effects


# -- leading -----------------------------------------------------------------------------------------


def test_a_new_leader_commits_the_document_in_its_own_term_before_it_acts() -> None:
    one = standing().hear("b:1", ms.VoteReply(True, False), term=2)
    sent = one.sent(ms.Append)
    assert [m.body.document for m in sent] == [TRIO.next(2)] * 2
    assert not one.election.may_act
    assert one.election.answer(one.now) is None
    one.step(ev.Propose("other", TRIO.version))
    assert "under way" in one.got(ev.Refused)[0].reason


def test_a_commit_is_told_and_learnt() -> None:
    one, newer = awake(), TRIO.next(2)
    one.hear("b:1", ms.Append(0.0, TRIO.version, newer), term=2)
    assert [c.document for c in one.got(ev.Committed)] == [TRIO]
    one.hear("b:1", ms.Append(0.5, TRIO.version), term=2)
    assert not one.got(ev.Committed)
    one.hear("b:1", ms.Append(1.0, newer.version), term=2)
    assert [c.document for c in one.got(ev.Committed)] == [newer]
    one.hear("b:1", ms.Append(1.5, newer.version), term=2)
    assert not one.got(ev.Committed)


def test_proposals_one_at_a_time_and_only_on_what_is_in_force() -> None:
    one = leading()
    base = one.election.version
    assert "made from" in one.step(ev.Propose("x", TRIO.version)).got(ev.Refused)[0].reason
    one.step(ev.Propose("x", base))
    assert one.sent(ms.Append)[0].body.document.body == "x"
    assert "under way" in one.step(ev.Propose("y", base)).got(ev.Refused)[0].reason
    one.hear("b:1", ms.AppendReply(one.now, Version(2, 5)), term=2).synced()
    assert [c.document.body for c in one.got(ev.Committed)] == ["x"]
    assert one.election.is_idle


def test_a_follower_names_the_leader_when_it_refuses() -> None:
    one = awake().hear("b:1", ms.Append(0.0, TRIO.version), term=1)
    assert "b:1" in one.step(ev.Propose("x", TRIO.version)).got(ev.Refused)[0].reason


def test_a_leader_answers_while_a_majority_has_promised_and_no_longer() -> None:
    one = leading()
    since = one.now
    assert one.election.answer(since + SETTINGS.lease_seconds - 0.01) is one.election.committed
    assert one.election.answer(since + SETTINGS.lease_seconds) is None


def test_a_leader_that_reaches_no_majority_steps_down() -> None:
    one = leading()
    silent_since = one.now
    while one.election.role is Role.LEADER:
        one.tick()
        assert one.now < silent_since + 2 * SETTINGS.timeout_max_seconds
    assert one.got(ev.StepDown)[0].term == 2
    assert one.now > silent_since + SETTINGS.timeout_max_seconds


def test_a_leader_that_wakes_late_blames_nobody_and_confirms_first() -> None:
    one = leading()
    assert one.election.is_confirmed()
    one.step(ev.Tick(), one.now + 100)
    assert one.election.role is Role.LEADER
    assert not one.election.is_confirmed()
    assert one.election.answer(one.now) is None
    one.hear("b:1", ms.AppendReply(one.now, one.election.version), term=2)
    assert one.election.is_confirmed()
    assert one.election.answer(one.now) is one.election.committed


def test_a_follower_that_wakes_late_waits_anew() -> None:
    one = awake().hear("b:1", ms.Append(0.0, TRIO.version), term=1)
    one.step(ev.Tick(), one.now + 100)
    assert one.election.role is Role.FOLLOWER
    assert one.timer >= one.now + SETTINGS.timeout_min_seconds


def test_a_delayed_heartbeat_of_an_older_term_is_answered_with_the_newer_one() -> None:
    one = awake().hear("b:1", ms.Append(0.0, TRIO.version, TRIO.next(3)), term=3).synced()
    one.hear("c:1", ms.Append(0.0, TRIO.version, TRIO.next(2, body="old")), term=2)
    assert [(m.receiver, m.term, m.body.sent_at) for m in one.sent(ms.AppendReply)] == [("c:1", 3, None)]
    assert one.election.leader == "b:1"
    assert one.election.document == TRIO.next(3)


def test_a_stranger_with_a_higher_term_does_not_move_the_leader() -> None:
    one = leading()
    one.hear("z:1", ms.AppendReply(one.now, Version(9, 9)), term=9)
    one.hear("z:1", ms.VoteRequest(Version(9, 9), pre=False), term=9)
    assert one.election.role is Role.LEADER
    assert one.election.term == 2


# -- voters come and go -----------------------------------------------------------------------------------


def test_a_voter_is_added_by_both_sets_and_the_old_set_then_dropped() -> None:
    one = leading().step(ev.AddVoter("d:1", witness=True))
    change = one.election.document
    assert change is not None
    assert (change.voters, change.previous, change.witnesses) == ((*TRIO.voters, "d:1"), TRIO.voters, ("d:1",))
    one.synced().hear("b:1", ms.AppendReply(one.now, change.version), term=2)
    assert not one.got(ev.Committed)  # two of four
    one.hear("d:1", ms.AppendReply(one.now, change.version), term=2)
    assert one.got(ev.Committed)
    assert one.election.document is not None
    assert one.election.document.previous == ()
    assert not one.election.is_idle


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (ev.AddVoter("b:2"), "has a vote already"),
        (ev.AddVoter("old:1"), "removed once"),
        (ev.RemoveVoter("a:1"), "transfer the lead first"),
        (ev.RemoveVoter("z:1"), "no voter"),
        (ev.TransferTo("z:1"), "not another voter"),
        (ev.TransferTo("a:1"), "not another voter"),
        (ev.TransferTo("c:1"), "witness"),
        (ev.Bootstrap(("a:1",), ""), "given once"),
        (ev.ForceNewCluster(), "quorum is not lost"),
    ],
)
def test_commands_that_would_do_harm_are_refused(command: ev.Command, reason: str) -> None:
    one = leading(replace(TRIO, retired=("old:1",), witnesses=("c:1",)))
    before = one.election.document
    assert reason in one.step(command).got(ev.Refused)[0].reason
    assert one.election.document is before


def test_a_removal_that_could_not_be_committed_is_refused() -> None:
    one = leading()
    while one.now < 20:
        one.tick()  # only b answers
        one.hear("b:1", ms.AppendReply(one.now, one.election.version), term=2)
    assert "could never be committed" in one.step(ev.RemoveVoter("b:1")).got(ev.Refused)[0].reason
    one.step(ev.RemoveVoter("c:1"))
    assert one.election.document is not None
    assert one.election.document.retired == ("c:1",)


def test_a_removed_id_is_dismissed_and_a_lost_disk_gets_its_seat_back_in_two_steps() -> None:
    one = leading(replace(TRIO, retired=("c:0",)))
    assert [m.receiver for m in one.hear("c:0", ms.Join(), term=0).sent(ms.Dismissal)] == ["c:0"]
    assert not one.hear("d:1", ms.Join(), term=0).effects  # nobody owes it a seat
    one.hear("c:2", ms.Join(), term=0)
    document = one.election.document
    assert document is not None
    assert (document.voters, document.retired, document.vacant) == (("a:1", "b:1"), ("c:0", "c:1"), ("c:1",))
    for _ in range(2):  # the change, then the set without the old one
        one.synced().hear("b:1", ms.AppendReply(one.now, one.election.version), term=2)
    assert one.election.is_idle
    one.hear("c:2", ms.Join(), term=0)
    document = one.election.document
    assert document is not None
    assert (document.voters, document.vacant) == (("a:1", "b:1", "c:2"), ())


def test_who_holds_a_seat_without_knowing_is_handed_the_document() -> None:
    one = awake().hear("c:1", ms.Join(), term=0)
    assert [m.body for m in one.sent(ms.VoteReply)] == [ms.VoteReply(False, True, TRIO)]


def test_a_disk_that_went_back_in_time_is_found_out_before_it_votes() -> None:
    one = Voter()
    assert {m.receiver for m in one.sent(ms.RollCall)} == {"b:1", "c:1"}
    assert not one.hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2, now=1.0).sent(ms.VoteReply)
    assert not one.writes
    assert not one.hear("b:1", ms.RollCallReply(4), term=1).got(ev.Retire)
    assert "back in time" in one.hear("c:1", ms.RollCallReply(5), term=1).got(ev.Retire)[0].reason
    assert not one.hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2, now=9.0).effects


def test_what_was_heard_of_a_voter_is_remembered_on_the_disk() -> None:
    one = awake().hear("b:1", ms.VoteRequest(TRIO.version, pre=False), term=2, sequence=77)
    assert dict(one.writes[-1].seen)["b:1"] == 77
    assert one.hear("b:1", ms.RollCall(), term=2, sequence=3).sent(ms.RollCallReply)[0].body == ms.RollCallReply(77)


def test_the_first_voter_set_must_make_sense() -> None:
    for command in (
        ev.Bootstrap(("b:1",), ""),
        ev.Bootstrap(("a:1", "a:1"), ""),
        ev.Bootstrap(("a:1",), "", witnesses=("a:1",)),
    ):
        one = Voter(document=None, era=Era(0, ""))
        assert one.step(command).got(ev.Refused)
    one = Voter(document=None, era=Era(0, "")).step(ev.Bootstrap(("a:1",), "first"))
    assert one.writes[-1].era == ERA
    assert one.writes[-1].document == Document(Version(0, 1), "first", ("a:1",))


def test_a_voter_of_an_older_era_is_retired() -> None:
    one = awake()
    one.step(ms.Message("home", Era(2, "b:1"), "b:1", "a:1", 3, 1, ms.RollCallReply(0)))
    assert "founded anew" in one.got(ev.Retire)[0].reason


# -- who should lead ----------------------------------------------------------------------------------------

THREE = (Candidate("a", health=0.9, load=0.5), Candidate("b", health=0.4, load=0.1), Candidate("c"))


@pytest.mark.parametrize(
    ("strategy", "leader", "best"),
    [("health_based", "a", "c"), ("load_based", "a", "c"), ("round_robin", "a", "b"), ("round_robin", "c", "a")],
)
def test_a_strategy_ranks_the_nodes(strategy: Strategy, leader: str, best: str) -> None:
    ranked = priorities(strategy, THREE, leader, None, 0.0)
    assert max(ranked, key=lambda n: ranked[n]) == best
    assert all(0 <= p <= 1 for p in ranked.values())


@pytest.mark.parametrize("strategy", ["health_based", "load_based", "round_robin", "manual"])
def test_a_pin_outweighs_every_strategy_until_it_expires(strategy: Strategy) -> None:
    pin = Pin("b", expires_at=10.0)
    ranked = priorities(strategy, THREE, "a", pin, 9.9)
    assert all(ranked["b"] > ranked[n] for n in "ac")
    assert priorities(strategy, THREE, "a", pin, 10.0) == priorities(strategy, THREE, "a", None, 10.0)


def test_a_better_node_gets_the_lead_when_it_stays_better() -> None:
    hand_overs = HandOvers("health_based", margin=0.2, hold_seconds=30, cooldown_seconds=60)
    worse, better = Candidate("a", health=0.5), Candidate("b", health=1.0)
    assert [hand_overs.observe("a", (worse, better), None, t) for t in (0, 29, 59)] == [None] * 3
    flap = hand_overs.observe("a", (worse, replace(better, health=0.1)), None, 59.5)
    assert [flap, *(hand_overs.observe("a", (worse, better), None, t) for t in (60, 89))] == [None] * 3
    assert hand_overs.observe("a", (worse, better), None, 90) == "b"


def test_a_little_better_is_not_enough() -> None:
    hand_overs = HandOvers("health_based", margin=0.2, hold_seconds=1, cooldown_seconds=1)
    pair = (Candidate("a", health=0.9), Candidate("b", health=1.0))
    assert not any(hand_overs.observe("a", pair, None, float(t)) for t in range(1000))


def test_turns_last_their_time_and_a_pinned_leader_keeps_the_lead() -> None:
    hand_overs = HandOvers("round_robin", turn_seconds=100)
    assert hand_overs.observe("a", THREE, None, 0) is None
    assert hand_overs.observe("a", THREE, None, 99) is None
    assert hand_overs.observe("a", THREE, Pin("a"), 100) is None
    assert hand_overs.observe("a", THREE, None, 101) is None
    assert hand_overs.observe("a", THREE, None, 105) == "b"
    hand_overs.stopped()
    assert hand_overs.observe("a", THREE, None, 106) is None


def test_manual_moves_the_lead_only_to_the_pinned_node() -> None:
    hand_overs = HandOvers("manual", settle_seconds=3)
    assert not any(hand_overs.observe("a", THREE, None, float(t)) for t in range(1000))
    assert hand_overs.observe("a", THREE, Pin("c"), 1000.0) is None
    assert hand_overs.observe("a", THREE, Pin("c"), 1003.0) == "c"
    assert hand_overs.observe("a", THREE, Pin("gone"), 1004.0) is None
