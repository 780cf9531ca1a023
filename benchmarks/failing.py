"""Tokens per second while stage processes keep dying: streams that resume against streams that begin again.

Owns: the clients, the seeded failures, the two ways, the table. Does not own: the cluster and the command line
(``failover``, mode ``--throughput``).

A *token-step* is one token for every stream that still runs; at each, with the given probability, a stage process drawn
by the seed is killed as soon as the pipeline serves. *Resumed*: as the system is. *From scratch*: the gateway gives a
broken stream up at once (`api_gateway.recovery_timeout` of a millisecond, the least it takes), and its client sends the
same request again until it has a whole answer. Only tokens of whole answers count; a run ends when all are there, or
at its bound. Every answer must be that of the first quiet run, which is not among the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.cluster_processes import alive
from tests.faults.fleet import GATEWAY, STANDBY, Fleet, bodies

PAUSE_SECONDS = 0.1  # of a client before it asks again, and between looks at the pipeline
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "resumed": {"api_gateway": {"recovery_timeout": 300.0, "timeout": 600.0}},
    "from scratch": {"api_gateway": {"recovery_timeout": 0.001}},
}

Running = Callable[[str, dict[str, dict[str, Any]]], AbstractContextManager[Fleet]]


@dataclass(frozen=True, slots=True)
class Options:
    rates: tuple[float, ...]
    streams: int
    tokens: int
    bound_seconds: float
    seed: int


@dataclass(slots=True)
class Tally:
    """What the clients have had, and at which step the next failure is due."""

    running: int
    steps: float = 0.0
    due: float = math.inf
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    whole: dict[int, list[str]] = field(default_factory=dict)
    begun_again: int = 0
    kills: int = 0

    def count(self, tokens: int) -> None:
        self.steps += tokens / max(1, self.running)
        if self.steps >= self.due:
            self.reached.set()


def steps_to_failure(rng: random.Random, rate: float) -> float:
    """How many token-steps pass until the next failure, geometrically distributed; none ever at rate 0."""
    return math.inf if rate <= 0 else 1 + math.floor(math.log(1.0 - rng.random()) / math.log1p(-rate))


async def answer(client: httpx.AsyncClient, url: str, body: dict[str, Any], tally: Tally) -> list[str]:
    """The tokens of one request, fewer than it asks for when it broke off, none when it was refused."""
    tokens: list[str] = []
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return []
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                for choice in event.get("choices", ()):
                    new = (choice.get("logprobs") or {}).get("tokens", [])
                    tokens += new
                    tally.count(len(new))
    except httpx.HTTPError:
        pass  # a broken connection is a broken answer
    return tokens


async def client_of(index: int, client: httpx.AsyncClient, url: str, tokens_wanted: int, tally: Tally) -> None:
    """Ask until there is a whole answer."""
    body = {**bodies()[index], "max_tokens": tokens_wanted}
    while len(tokens := await answer(client, url, body, tally)) < tokens_wanted:
        tally.begun_again += bool(tokens)
        await asyncio.sleep(PAUSE_SECONDS)
    tally.whole[index] = tokens
    tally.running -= 1


async def kill_stages(four: Fleet, rate: float, rng: random.Random, tally: Tally) -> None:
    while True:
        tally.due = tally.steps + steps_to_failure(rng, rate)
        tally.reached.clear()
        await tally.reached.wait()
        index = rng.randrange(2)
        while (pid := await asyncio.to_thread(_stage_of, four, index)) is None:
            await asyncio.sleep(PAUSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            tally.kills += 1


def _stage_of(four: Fleet, index: int) -> int | None:
    """The process of a stage of the pipeline while it serves."""
    pipeline = four.cluster.pipeline(STANDBY)
    if pipeline is None or pipeline["state"] != "ready":
        return None
    pids = [int(stage["pid"] or 0) for stage in pipeline["stages"]]
    return pids[index] if all(pid and alive(pid) for pid in pids) else None


async def run(four: Fleet, rate: float, options: Options) -> tuple[dict[str, Any], dict[int, list[str]]]:
    """The figures of a run, and its whole answers by stream."""
    tally = Tally(options.streams)
    rng = random.Random(options.seed)
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=options.bound_seconds, trust_env=False) as client:
        killer = asyncio.create_task(kill_stages(four, rate, rng, tally))
        url = four.cluster.gateway(GATEWAY)
        try:
            async with asyncio.timeout(options.bound_seconds):
                await asyncio.gather(
                    *(client_of(i, client, url, options.tokens, tally) for i in range(options.streams))
                )
        except TimeoutError:
            pass  # what is whole by then counts, and the table says how much that was
        finally:
            seconds = time.monotonic() - began
            killer.cancel()
            await asyncio.gather(killer, return_exceptions=True)
    figures = {
        "rate": rate,
        "answers": len(tally.whole),
        "wanted": options.streams,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(options.tokens * len(tally.whole) / seconds, 2),
        "token_steps": round(tally.steps),
        "kills": tally.kills,
        "begun_again": tally.begun_again,
    }
    return figures, tally.whole


def throughput(options: Options, running: Running) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    reference: dict[int, list[str]] = {}
    print(f"{'':14} {'failures per':>12} {'':>10} {'':>8} {'begun':>6} {'':>7}")
    print(f"{'':14} {'token-step':>12} {'tokens/s':>10} {'killed':>8} {'again':>6} {'seconds':>7}   answers")
    for way, settings in WAYS.items():
        with running("grpc", settings) as four:
            if not reference:
                _, reference = asyncio.run(run(four, 0.0, options))
            for rate in options.rates:
                four.balanced()
                figures, answers = asyncio.run(run(four, rate, options))
                wrong = [index for index, tokens in answers.items() if tokens != reference.get(index, tokens)]
                if wrong:
                    raise AssertionError(f"{way}, rate {rate:g}: the answers {wrong} differ from the quiet run's")
                results.append({"way": way, **figures})
                print(line(results[-1]), flush=True)
    return results


def line(result: dict[str, Any]) -> str:
    finished = result["answers"] == result["wanted"]
    end = "all" if finished else f"DID NOT FINISH: {result['answers']}"
    return (
        f"{result['way']:14} {result['rate']:12g} {result['tokens_per_second']:10.1f} {result['kills']:8d} "
        f"{result['begun_again']:6d} {result['seconds']:7.1f}   {end} of {result['wanted']}"
    )
