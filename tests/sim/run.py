"""Run many histories: ``python -m tests.sim.run --histories 20000 --seed 7``, or one of them with ``--only SEED``.

Prints the seed of every history that breaks an invariant, and exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from multiprocessing import get_context

from tests.sim.checker import Broken
from tests.sim.faults import history


def attempt(seed: int) -> tuple[int, int, float, str]:
    """(seed, events, virtual seconds, what broke)."""
    try:
        world = history(seed)
    except Broken as broken:
        return seed, 0, 0.0, str(broken)
    return seed, world.num_events, world.now, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None, help="seed of the seeds; a fresh one is drawn and printed")
    parser.add_argument("--only", type=int, default=None, metavar="SEED", help="one history, with its trace on failure")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.only is not None:
        world = history(arguments.only, trace=True)
        print(f"seed {arguments.only} holds: {world.num_events} events, {world.now:.1f} virtual seconds")
        return 0
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    draw = random.Random(seed)
    seeds = [draw.getrandbits(48) for _ in range(arguments.histories)]
    print(f"{len(seeds)} histories from --seed {seed}", flush=True)
    started = time.monotonic()
    failures = events = 0
    with get_context("spawn").Pool(arguments.processes) as pool:
        for one, num_events, _, broken in pool.imap_unordered(attempt, seeds, chunksize=50):
            events += num_events
            if broken:
                failures += 1
                print(f"--only {one}: {broken}", flush=True)
    seconds = time.monotonic() - started
    print(f"{failures} of {len(seeds)} broke; {events} events, {len(seeds) / seconds:.0f} histories/s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
