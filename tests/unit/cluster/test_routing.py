"""The routing policies, ejection and slow return, with scripted time and chance."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mlx_cluster.cluster.routing import (
    EJECT_AFTER,
    EJECT_MAX_SECONDS,
    EJECT_SECONDS,
    READMIT_SECONDS,
    Replica,
    Router,
    RoutingPolicy,
)

A, B, C = Replica("a"), Replica("b"), Replica("c")
POLICIES: tuple[RoutingPolicy, ...] = (
    "round_robin",
    "least_connections",
    "least_latency",
    "random",
    "weighted",
    "prefix_affinity",
)


def router(policy: RoutingPolicy, seed: int = 1) -> Router:
    return Router(policy, random.Random(seed).random)


def serve(
    r: Router, replicas: list[Replica], now: float, prompt: tuple[int, ...] = (1, 2), failed: bool = False
) -> str:
    chosen = r.choose(replicas, prompt, "", now)
    r.sent(chosen.pipeline)
    r.ended(chosen.pipeline, failed=failed, now=now)
    return chosen.pipeline


@pytest.mark.parametrize("policy", POLICIES)
def test_the_only_replica_is_chosen_even_when_it_fails(policy: RoutingPolicy) -> None:
    r = router(policy)
    assert {serve(r, [A], now, failed=True) for now in range(20)} == {"a"}


def test_round_robin_takes_turns() -> None:
    r = router("round_robin")
    assert [serve(r, [A, B, C], now) for now in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_least_connections_weighs_what_runs() -> None:
    r = router("least_connections")
    heavy = Replica("heavy", weight=3.0)
    chosen = Counter()
    for now in range(8):
        pick = r.choose([A, heavy], (1,), "", now)
        r.sent(pick.pipeline)
        chosen[pick.pipeline] += 1
    assert chosen == {"heavy": 6, "a": 2}


def test_least_latency_prefers_the_quick_one_and_tries_each_once() -> None:
    r = router("least_latency")
    for seconds, now in ((0.5, 0.0), (0.1, 1.0)):
        pick = r.choose([A, B], (1,), "", now)
        r.sent(pick.pipeline)
        r.first_token(pick.pipeline, seconds)
        r.ended(pick.pipeline, failed=False, now=now)
    assert serve(r, [A, B], 2.0) == "b"
    for _ in range(6):  # each one more there makes it slower
        r.sent("b")
    assert serve(r, [A, B], 9.0) == "a"


def test_random_and_weighted_follow_their_shares() -> None:
    even = Counter(serve(r, [A, B], now) for r in [router("random")] for now in range(2000))
    assert 900 < even["a"] < 1100
    parts = Counter(serve(r, [A, Replica("b", 3.0)], now) for r in [router("weighted")] for now in range(2000))
    assert 1400 < parts["b"] < 1600


def test_prefix_affinity_keeps_a_conversation_and_moves_only_what_it_must() -> None:
    r = router("prefix_affinity")
    prompts = [(n, *range(100)) for n in range(200)]
    first = {p: serve(r, [A, B, C], 0.0, p) for p in prompts}
    assert set(first.values()) == {"a", "b", "c"}
    longer = {p: serve(r, [A, B, C], 1.0, (*p, 7, 8, 9)) for p in prompts}
    assert longer == first, "a longer conversation with the same beginning stays"
    without_c = {p: serve(r, [A, B], 2.0, p) for p in prompts}
    assert all(without_c[p] == first[p] for p in prompts if first[p] != "c")


def test_prefix_affinity_spreads_a_hot_prompt() -> None:
    r = router("prefix_affinity")
    chosen: Counter[str] = Counter()
    for _ in range(30):
        pick = r.choose([A, B, C], (1, 2, 3), "", 0.0)
        r.sent(pick.pipeline)
        chosen[pick.pipeline] += 1
    assert max(chosen.values()) <= 14
    assert min(chosen.values()) >= 4


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replica_that_keeps_failing_is_left_alone_and_comes_back_slowly(policy: RoutingPolicy) -> None:
    r = router(policy)
    for _ in range(EJECT_AFTER):
        r.sent("a")
        r.ended("a", failed=True, now=0.0)
    r.sent("b")
    r.ended("b", failed=False, now=0.0)
    assert {serve(r, [A, B], EJECT_SECONDS - 0.1, (n,)) for n in range(50)} == {"b"}
    back = Counter(serve(r, [A, B], EJECT_SECONDS + READMIT_SECONDS / 5, (n,)) for n in range(300))
    assert 0 < back["a"] < 150
    later = Counter(serve(r, [A, B], EJECT_SECONDS + READMIT_SECONDS + 1, (n,)) for n in range(300))
    assert later["a"] > 0


def test_every_relapse_doubles_the_pause_up_to_a_bound() -> None:
    r = router("round_robin")
    now, pauses = 0.0, []
    for _ in range(10):
        while r.snapshot(now).get("a", {}).get("ejected") is not True:
            r.sent("a")
            r.ended("a", failed=True, now=now)
        start = now
        while r.snapshot(now)["a"]["ejected"]:
            now += 0.5
        pauses.append(now - start)
    assert pauses[0] == EJECT_SECONDS
    assert pauses[1] == 2 * EJECT_SECONDS
    assert pauses[-1] == EJECT_MAX_SECONDS


def test_when_all_are_ejected_all_are_offered() -> None:
    r = router("round_robin")
    for name in ("a", "b"):
        for _ in range(EJECT_AFTER):
            r.sent(name)
            r.ended(name, failed=True, now=0.0)
    assert {serve(r, [A, B], 1.0 + n) for n in range(4)} == {"a", "b"}
