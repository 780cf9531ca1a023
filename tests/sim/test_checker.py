"""The checker can fail: with any one rule broken, some history or trap breaks an invariant."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim import mutants, traps
from tests.sim.checker import Broken
from tests.sim.mutants import Mutant, run_mutant
from tests.sim.traps import Trap

# A limit is some ten times the number of histories that it takes on average to notice.
IN_HISTORIES: list[tuple[Mutant, int]] = [
    (mutants.SpeaksBeforeTheDisk, 20),
    (mutants.CountsItselfBeforeItsDisk, 150),
    (mutants.VotesForOlderDocuments, 300),
    (mutants.TrustsAnOlderTerm, 150),
    (mutants.KeepsItsIdWithoutItsDisk, 150),
    (mutants.CountsOnTheWallClock, 300),
    (mutants.AgentsWithoutFence, 300),
]
IN_TRAPS: list[tuple[type[mutants.Election], Trap, int]] = [
    (mutants.VotesTwice, traps.contest, 150),
    (mutants.BreaksItsPromise, traps.deaf_voter, 10),
    (mutants.ForgetsItsPromiseInACrash, traps.deaf_voter, 20),
    (mutants.LeaseWithoutMargin, traps.fast_followers, 150),
    (mutants.FollowsADelayedLeader, traps.late_heartbeats, 50),
    (mutants.PromisesToAFormerLife, traps.reborn_leader, 100),
    (mutants.LeaseFromWhenTheAnswerCame, traps.late_answers, 10),
]


def is_noticed(run: Callable[[int], None], limit: int) -> bool:
    for seed in range(limit):
        try:
            run(seed)
        except Broken:
            return True
    return False


@pytest.mark.parametrize(("mutant", "limit"), IN_HISTORIES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_noticed_in_some_history(mutant: Mutant, limit: int) -> None:
    assert is_noticed(lambda seed: run_mutant(mutant, seed), limit)


@pytest.mark.parametrize(("mutant", "trap", "limit"), IN_TRAPS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_noticed_in_its_trap(mutant: type[mutants.Election], trap: Trap, limit: int) -> None:
    assert is_noticed(lambda seed: trap(seed, mutant), limit)
