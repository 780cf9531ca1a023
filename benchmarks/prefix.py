"""What a prefix hit saves: time to the first token of a prompt that begins like an earlier one, against a cold one.

    python benchmarks/prefix.py --tokens 1000 --repeat 5 --json prefix.json

Two stages of the dense checkpoint of ``peers.py`` (98 M random parameters). Each repetition sends a text that nobody
has seen (cold), then the same text with another ending (its first ``tokens`` tokens are a hit); the answer's usage says
how many tokens were really found. Figures are medians over the repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import peers, record, serve

ENDING = " and then?"
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class First:
    """One request: when its first token came, and how much of its prompt was found."""

    milliseconds: float
    prompt_tokens: int
    cached_tokens: int


def ask(client: httpx.Client, url: str, model: str, prompt: str) -> First:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, first, usage = time.perf_counter(), 0.0, dict[str, Any]()
    with client.stream("POST", f"{url}/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event["choices"] and not first:
                first = time.perf_counter()
            usage = event.get("usage") or usage
    details = usage.get("prompt_tokens_details") or {}
    return First(1000 * (first - sent), usage["prompt_tokens"], details.get("cached_tokens", 0))


def text(tokens: int, seed: int) -> str:
    """Of about this many tokens, one character each; no two seeds begin alike."""
    load = serve.Load("", "", 1, 1, tokens, 1, characters_per_token=1.0, seed=seed)
    return serve.prompt_text(load, 0)


def measure(url: str, model: str, tokens: int, repeat: int) -> dict[str, Any]:
    pairs: list[tuple[First, First]] = []
    with httpx.Client(timeout=120, trust_env=False) as client:
        for seed in range(-WARM_UPS, repeat):
            prompt = text(tokens, seed + 1000)
            pair = ask(client, url, model, prompt), ask(client, url, model, prompt + ENDING)
            if seed >= 0:
                print(f"cold {pair[0].milliseconds:8.1f} ms   hit {pair[1].milliseconds:8.1f} ms", flush=True)
                pairs.append(pair)
    cold, hit = (statistics.median(each.milliseconds for each in side) for side in zip(*pairs, strict=True))
    found = min(each[1].cached_tokens for each in pairs)
    print(f"{pairs[0][0].prompt_tokens} prompt tokens, {found} found: hit / cold = {hit / cold:.3f}")
    return {
        "prompt_tokens": pairs[0][0].prompt_tokens,
        "least_cached_tokens": found,
        "most_cached_when_cold": max(each[0].cached_tokens for each in pairs),
        "cold_ms": cold,
        "hit_ms": hit,
        "ratio": hit / cold,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the checkpoint in (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scenario = peers.SCENARIOS["prefill"]
        model = peers.checkpoint(folder, scenario.checkpoint)
        url, name = stack.enter_context(peers.running("ours-2", model, scenario))
        result = measure(url, name, arguments.tokens, arguments.repeat)
    record.save(arguments.json, "prefix", result)


if __name__ == "__main__":
    main()
