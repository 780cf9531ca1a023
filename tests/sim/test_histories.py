"""Thousands of histories, half with seeds that have never been drawn before. ``make sim`` runs more of them."""

from __future__ import annotations

import random

import pytest

from tests.sim.checker import Broken
from tests.sim.faults import MIN_EVENTS, history
from tests.sim.traps import TRAPS, Trap

NUM_FIXED = 1000
NUM_FRESH = 1000


def run_all(seeds: list[int]) -> None:
    broken = []
    for seed in seeds:
        try:
            world = history(seed)
        except Broken as error:
            broken.append(f"python -m tests.sim.run --only {seed}: {error}")
        else:
            assert world.num_events >= MIN_EVENTS
    assert not broken, "\n".join(broken)


@pytest.mark.timeout(600)
def test_no_invariant_breaks_in_known_histories() -> None:
    run_all(list(range(NUM_FIXED)))


@pytest.mark.timeout(600)
def test_no_invariant_breaks_in_fresh_histories(capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().getrandbits(32)
    with capsys.disabled():
        print(f"\n{NUM_FRESH} fresh histories: python -m tests.sim.run --histories {NUM_FRESH} --seed {seed}")
    draw = random.Random(seed)
    run_all([draw.getrandbits(48) for _ in range(NUM_FRESH)])


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_no_invariant_breaks_in_a_trap(trap: Trap) -> None:
    for seed in range(100):
        trap(seed)


def test_the_same_seed_is_the_same_history() -> None:
    one, two = history(7), history(7)
    assert (one.now, one.num_events, one.checker.committed) == (two.now, two.num_events, two.checker.committed)


def test_histories_are_eventful() -> None:
    worlds = [history(seed) for seed in range(60)]
    num_terms = sum(len(world.checker.leaders) for world in worlds)
    num_documents = sum(len(world.checker.committed) for world in worlds)
    voter_sets = sum(len({d.voters for d in world.checker.committed.values()}) - 1 for world in worlds)
    assert num_terms > 120
    assert num_documents > 360
    assert voter_sets > 30
    assert sum(len(world.checker.lost) for world in worlds) > 15
