"""The waiting queue: its bound, its order, fairness, patience, and that everybody leaves exactly once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.engine.waiting import (
    MAX_DEBTORS,
    MAX_RETRY_SECONDS,
    UNMEASURED_RETRY_SECONDS,
    Share,
    WaitingQueue,
)
from mlx_cluster.errors import Overloaded
from mlx_cluster.request import Sampling, SequenceRequest


@dataclass(frozen=True)
class Waiter:
    id: int
    request: SequenceRequest


@dataclass
class Desk:
    """A queue and names for who waits in it."""

    queue: WaitingQueue[Waiter]
    ids: count[int]

    def push(
        self,
        tenant: str = "",
        priority: int = 0,
        now: float = 0.0,
        *,
        tokens: int = 10,
        patience: float | None = None,
        emitted: tuple[int, ...] = (),
        room: int = 0,
    ) -> Waiter:
        waiter, _ = self.crowd(tenant, priority, now, tokens=tokens, patience=patience, emitted=emitted, room=room)
        return waiter

    def crowd(
        self,
        tenant: str = "",
        priority: int = 0,
        now: float = 0.0,
        *,
        tokens: int = 10,
        patience: float | None = None,
        emitted: tuple[int, ...] = (),
        room: int = 0,
    ) -> tuple[Waiter, Waiter | None]:
        request = SequenceRequest(
            "r",
            "m",
            (1, 2),
            tokens - 2,
            Sampling(),
            tenant=tenant,
            priority=priority,
            queue_seconds=patience,
            emitted=emitted,
        )
        waiter = Waiter(next(self.ids), request)
        return waiter, self.queue.push(waiter, now, room=room)

    def drain(self, now: float = 0.0) -> list[int]:
        return [self.queue.pop(now).id for _ in range(len(self.queue))]

    def tenants(self, num: int, now: float = 0.0) -> str:
        return "".join(self.queue.pop(now).request.tenant for _ in range(num))


def desk(bound: int = 100, ageing: float = 10.0, **shares: Share) -> Desk:
    return Desk(WaitingQueue(bound, shares, ageing_seconds=ageing), count())


# -- order --------------------------------------------------------------------------------------------


def test_one_tenant_is_served_first_in_first_out() -> None:
    d = desk()
    pushed = [d.push().id for _ in range(5)]
    assert d.drain() == pushed


def test_a_higher_priority_goes_first() -> None:
    d = desk()
    low, high, middle = d.push(priority=-1), d.push(priority=3), d.push()
    assert d.drain() == [high.id, middle.id, low.id]


def test_resumed_and_preempted_work_goes_before_everything_and_past_the_bound() -> None:
    d = desk(bound=1)
    new = d.push(priority=9)
    first, second = d.push(emitted=(7,)), d.push(emitted=(7,), priority=-5)
    preempted = Waiter(99, new.request)
    d.queue.push_front(preempted)
    assert len(d.queue) == 4
    assert d.drain() == [99, first.id, second.id, new.id]


def test_two_tenants_take_turns_however_many_one_of_them_sent() -> None:
    d = desk()
    for _ in range(8):
        d.push("a")
    d.push("b")
    d.push("b")
    assert d.tenants(5) == "ababa"


def test_what_counts_is_tokens_and_not_requests() -> None:
    d = desk()
    for _ in range(9):
        d.push("a", tokens=10)
        d.push("b", tokens=40)
    served = Counter(d.tenants(10))
    assert served == {"a": 8, "b": 2}


def test_a_weight_of_three_gets_three_times_as_much() -> None:
    d = desk(a=Share(weight=3.0))
    for _ in range(20):
        d.push("a")
        d.push("b")
    assert Counter(d.tenants(12)) == {"a": 9, "b": 3}


def test_who_was_away_has_saved_nothing_up() -> None:
    d = desk()
    for _ in range(12):
        d.push("a")
    d.tenants(6)
    for _ in range(6):
        d.push("b")
    assert d.tenants(6).count("b") <= 4  # half, and one for the start


def test_tokens_that_were_not_used_are_given_back() -> None:
    d = desk()
    for _ in range(4):
        d.push("a", tokens=100)
        d.push("b", tokens=100)
    first = d.queue.pop(0.0)
    assert first.request.tenant == "a"
    d.queue.settle(first.request, 90)
    # Of its 100 tokens a used 10: it may go on until it has had as many as b.
    assert d.tenants(3) == "bab"


def test_a_class_that_is_not_served_ages_past_the_ones_above_it() -> None:
    d = desk(ageing=10.0)
    low = d.push(priority=0)
    served: list[int] = []
    for step in range(40):
        d.push(priority=2, now=float(step))
        served.append(d.queue.pop(float(step)).id)
    assert low.id in served
    assert 30 <= served.index(low.id) <= 31  # two classes below: after three times the ageing it is strictly higher


def test_ageing_does_not_let_a_flood_pass_a_newcomer_of_another_tenant() -> None:
    d = desk(ageing=1.0)
    for _ in range(50):
        d.push("flood")
    now = 0.0
    for _ in range(20):
        now += 1.0
        d.queue.pop(now)
    late = d.push("late", now=now)
    assert late.id in [d.queue.pop(now).id for _ in range(2)]


# -- the bound ----------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    d = desk(bound=2)
    d.push()
    d.push()
    with pytest.raises(Overloaded, match="2 sequences are waiting already") as refused:
        d.push()
    assert refused.value.retry_after_seconds == UNMEASURED_RETRY_SECONDS
    assert len(d.queue) == 2


def test_free_rows_count_beyond_the_bound() -> None:
    d = desk(bound=0)
    d.push(room=1)
    with pytest.raises(Overloaded):
        d.push(room=1)


def test_retry_after_comes_from_the_measured_rate_of_admission() -> None:
    d = desk(bound=4)
    now = 0.0
    for _ in range(20):
        while len(d.queue) < 4:
            d.push(now=now)
        now += 3.0
        d.queue.pop(now)
    d.push(now=now)
    with pytest.raises(Overloaded) as refused:
        d.push(now=now)
    assert refused.value.retry_after_seconds == pytest.approx(3.0 * 5, rel=0.15)
    stalled = d.queue.retry_after_seconds(now + 600)
    assert stalled in (UNMEASURED_RETRY_SECONDS, MAX_RETRY_SECONDS)


def test_a_queue_that_stands_idle_does_not_look_slow() -> None:
    d = desk(bound=1)
    now = 0.0
    for _ in range(30):
        d.push(now=now)
        now += 0.5
        d.queue.pop(now)
        now += 20.0  # nobody waits
    d.push(now=now)
    with pytest.raises(Overloaded) as refused:
        d.push(now=now)
    assert refused.value.retry_after_seconds <= 1.5


def test_a_key_may_not_have_more_waiting_than_its_own_bound() -> None:
    d = desk(a=Share(max_waiting=1))
    d.push("a")
    with pytest.raises(Overloaded, match="max_waiting is 1"):
        d.push("a")
    d.push("b")


def test_a_full_queue_gives_up_the_last_of_who_crowds_it() -> None:
    d = desk(bound=4)
    flood = [d.push("flood") for _ in range(4)]
    newcomer, evicted = d.crowd("late")
    assert evicted is flood[-1]
    assert newcomer.id in d.queue
    assert evicted.id not in d.queue
    assert len(d.queue) == 4


def test_two_tenants_with_equal_shares_do_not_push_each_other_out() -> None:
    d = desk(bound=4)
    for tenant in "abab":
        d.push(tenant)
    for tenant in "ab":
        with pytest.raises(Overloaded):
            d.push(tenant)


def test_a_lower_priority_makes_room_only_where_its_tenant_has_more_than_its_share() -> None:
    d = desk(bound=3)
    low = d.push("a", priority=-1)
    d.push("b", priority=0)
    d.push("b", priority=0)
    with pytest.raises(Overloaded):
        d.push("c", priority=-1)  # nobody below it who holds more
    _, evicted = d.crowd("a", priority=0)
    assert evicted is low  # its own, strictly lower one
    with pytest.raises(Overloaded):
        d.push("a", priority=0)


def test_nobody_of_a_higher_priority_makes_room() -> None:
    d = desk(bound=2)
    d.push("a", priority=1)
    d.push("a", priority=1)
    with pytest.raises(Overloaded):
        d.push("b", priority=0)


def test_a_heavier_weight_may_hold_more_of_the_queue() -> None:
    d = desk(bound=4, heavy=Share(weight=3.0))
    for _ in range(4):
        d.push("light")
    for _ in range(3):
        assert d.crowd("heavy")[1] is not None
    with pytest.raises(Overloaded):
        d.push("heavy")


# -- leaving ------------------------------------------------------------------------------------------


def test_patience_ends_a_wait_and_is_told_once() -> None:
    d = desk()
    hasty, patient, endless = d.push(patience=1.0), d.push(patience=5.0), d.push()
    assert d.queue.expire(0.9) == []
    assert d.queue.next_expiry == 1.0
    assert d.queue.expire(1.0) == [hasty]
    assert d.queue.expire(1.0) == []
    assert d.queue.expire(6.0) == [patient]
    assert d.drain(6.0) == [endless.id]
    assert d.queue.expire(99.0) == []


def test_resumed_work_has_all_the_patience() -> None:
    d = desk()
    resumed = d.push(patience=1.0, emitted=(5,))
    assert d.queue.expire(100.0) == []
    assert d.drain() == [resumed.id]


def test_removed_ones_are_gone_wherever_they_stood() -> None:
    d = desk()
    a, b, c = d.push("x"), d.push("y"), d.push(emitted=(1,))
    assert d.queue.remove(a.id) is a
    assert d.queue.remove(c.id) is c
    assert d.queue.remove(a.id) is None
    assert a.id not in d.queue
    assert d.drain() == [b.id]
    with pytest.raises(IndexError):
        d.queue.pop(0.0)
    assert d.queue.peek(0.0) is None


def test_cancelled_ones_and_tenants_of_the_past_take_no_memory() -> None:
    d = desk(bound=10)
    stays = d.push("stays")
    for index in range(5_000):
        left = d.push(f"key {index}", patience=1e9)
        d.queue.remove(left.id)
    assert len(d.queue._deadlines) < 200
    assert len(d.queue._classes[0].lines) <= MAX_DEBTORS + 20
    for index in range(5_000):
        d.push(f"key {index}")
        d.queue.pop(0.0)
    assert len(d.queue._classes[0].lines) <= MAX_DEBTORS + 20
    assert stays.id in d.queue or len(d.queue) == 1


actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("push"),
            st.sampled_from("abc"),
            st.integers(-2, 2),
            st.sampled_from([None, 0.5, 4.0]),
            st.integers(3, 60),
            st.booleans(),
        ),
        st.tuples(st.just("pop")),
        st.tuples(st.just("remove"), st.integers(0, 60)),
        st.tuples(st.just("wait"), st.floats(0.01, 5.0)),
        st.tuples(st.just("back"), st.integers(0, 60)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(actions=actions, bound=st.integers(0, 8), room=st.integers(0, 2))
def test_whatever_happens_everybody_leaves_once_and_the_bound_holds(
    actions: list[tuple[object, ...]], bound: int, room: int
) -> None:
    d = desk(bound=bound, ageing=1.0, a=Share(weight=2.5), b=Share(max_waiting=3))
    now = 0.0
    inside: dict[int, Waiter] = {}
    popped: list[Waiter] = []
    hints: list[float] = []
    for action in actions:
        match action:
            case ("push", str(tenant), int(priority), patience, int(tokens), bool(resumed)):
                try:
                    waiter, evicted = d.crowd(
                        tenant,
                        priority,
                        now,
                        tokens=tokens,
                        patience=patience,  # type: ignore[arg-type]
                        emitted=(1,) if resumed else (),
                        room=room,
                    )
                except Overloaded as refused:
                    hints.append(refused.retry_after_seconds)
                else:
                    inside[waiter.id] = waiter
                    if evicted is not None:
                        assert inside.pop(evicted.id) is evicted
                        assert evicted.request.priority <= priority
            case ("pop",) if inside:
                first = d.queue.peek(now)
                got = d.queue.pop(now)
                assert got is first
                assert inside.pop(got.id) is got
                popped.append(got)
            case ("remove", int(waiter_id)):
                assert d.queue.remove(waiter_id, now) is inside.pop(waiter_id, None)
            case ("wait", float(seconds)):
                now += seconds
                for late in d.queue.expire(now):
                    assert inside.pop(late.id) is late
                    assert late.request.queue_seconds is not None
            case ("back", int(index)) if popped:
                again = popped.pop(index % len(popped))
                d.queue.push_front(again)
                inside[again.id] = again
            case _:
                pass
        assert {w.id for w in d.queue} == set(inside)
        assert len(d.queue) == len(inside)
        assert len(d.queue._members) <= bound + room
    assert all(0 < hint <= MAX_RETRY_SECONDS for hint in hints)
    left = d.drain(now)
    assert sorted(left) == sorted(inside)
