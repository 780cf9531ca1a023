"""Random JSON schemas at temperature 1 against a real model: what ends, validates.

``benchmarks/schemas.py`` is the same with as many as one likes.
"""

from __future__ import annotations

import asyncio

from benchmarks import schemas


def test_every_finished_answer_and_call_follows_its_schema(url: str) -> None:
    tallies = asyncio.run(schemas.run(url, "demo", 20, seed=7))
    assert [name for name, tally in tallies.items() if tally.requests == 0] == []
    assert [line for tally in tallies.values() for line in tally.wrong] == []
    assert sum(tally.ended for tally in tallies.values()) >= 0.95 * sum(tally.requests for tally in tallies.values())
