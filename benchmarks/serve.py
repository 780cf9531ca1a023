"""Load on any OpenAI-compatible URL: TTFT, TPOT, ITL and tokens per second.

    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --model demo --clients 8 --max-tokens 32

TTFT: request sent until the first streamed token. ITL: time between two streamed tokens. TPOT as vLLM defines it:
(end − first token) / (tokens − 1) for each request. Tokens are counted by the server's usage where it sends it, else by
streamed events. Closed loop: ``--clients`` at once, each sends its next request when one ends, ``--requests`` in all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record

WORDS = ("the", "pipeline", "keeps", "every", "machine", "busy", "while", "tokens", "flow", "and", "nobody", "waits")


@dataclass(frozen=True, slots=True)
class Load:
    url: str
    model: str
    clients: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    characters_per_token: float = 4.0
    temperature: float = 0.0
    timeout_seconds: float = 600.0
    seed: int = 0
    ramp_seconds: float = 0.0  # from one client's first request to the next one's


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; times in seconds by the monotonic clock."""

    sent: float
    first: float = 0.0
    end: float = 0.0
    events: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""


def prompt_text(load: Load, index: int) -> str:
    """A different text for every request (no two share a prefix), of about the length asked for."""
    rng = random.Random(load.seed * 1_000_003 + index)
    length = max(1, int(load.prompt_tokens * load.characters_per_token))
    text = f"{rng.getrandbits(32):08x} "
    while len(text) < length:
        text += rng.choice(WORDS) + " "
    return text[:length]


async def one_request(client: httpx.AsyncClient, load: Load, index: int) -> Sample:
    body = {
        "model": load.model,
        "prompt": prompt_text(load, index),
        "max_tokens": load.max_tokens,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sample = Sample(sent=time.perf_counter())
    try:
        async with client.stream("POST", f"{load.url}/completions", json=body) as response:
            if response.status_code != 200:
                sample.error = f"{response.status_code}: {(await response.aread())[:200]!r}"
                return sample
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(sample, json.loads(line[6:]))
    except httpx.HTTPError as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end = sample.events[-1] if sample.events else time.perf_counter()
    sample.tokens = sample.tokens or len(sample.events)
    if not sample.events and not sample.error:
        sample.error = "no token came"
    return sample


def _take(sample: Sample, event: dict[str, Any]) -> None:
    if "error" in event:
        sample.error = str(event["error"])
    if event.get("usage"):
        sample.tokens = event["usage"]["completion_tokens"]
        sample.prompt_tokens = event["usage"]["prompt_tokens"]
    if any(choice.get("text") for choice in event.get("choices", ())):
        now = time.perf_counter()
        sample.first = sample.first or now
        sample.events.append(now)


async def run(load: Load) -> list[Sample]:
    """All requests of a load; at most ``clients`` at once."""
    limits = httpx.Limits(max_connections=load.clients + 4)
    samples: list[Sample] = []
    order = iter(range(load.requests))
    async with httpx.AsyncClient(timeout=load.timeout_seconds, limits=limits) as client:

        async def worker(number: int) -> None:
            await asyncio.sleep(number * load.ramp_seconds)
            for index in order:
                samples.append(await one_request(client, load, index))

        await asyncio.gather(*(worker(number) for number in range(load.clients)))
    return samples


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Figures of a run; times in milliseconds."""
    good = [s for s in samples if not s.error]
    if not good:
        return {"requests": len(samples), "errors": len(samples), "first_error": samples[0].error if samples else ""}
    wall = max(s.end for s in good) - min(s.sent for s in good)
    tpot = [(s.end - s.first) / (s.tokens - 1) for s in good if s.tokens > 1]
    itl = [b - a for s in good for a, b in zip(s.events, s.events[1:], strict=False)]
    errors = [s.error for s in samples if s.error]
    return {
        "requests": len(samples),
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "seconds": round(wall, 3),
        "prompt_tokens": sum(s.prompt_tokens for s in good),
        "output_tokens": sum(s.tokens for s in good),
        "tokens_per_second": round(sum(s.tokens for s in good) / wall, 2),
        "ttft_ms": _quantiles([s.first - s.sent for s in good]),
        "tpot_ms": _quantiles(tpot),
        "itl_ms": _quantiles(itl),
    }


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)

    def at(q: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2)

    return {"median": round(1000 * statistics.median(ordered), 2), "p90": at(0.9), "p99": at(0.99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, help="in all (default: one for each client)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--characters-per-token", type=float, default=4.0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    load = Load(
        url=arguments.url.rstrip("/"),
        model=arguments.model,
        clients=arguments.clients,
        requests=arguments.requests or arguments.clients,
        prompt_tokens=arguments.prompt_tokens,
        max_tokens=arguments.max_tokens,
        characters_per_token=arguments.characters_per_token,
        temperature=arguments.temperature,
    )
    figures = summary(asyncio.run(run(load)))
    print(json.dumps(figures, indent=1))
    record.save(arguments.json, "serve", figures)
    if figures["errors"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
