"""How soon a client that leaves is forgotten: from the close of its connection until no stage has anything of it.

    python benchmarks/disconnect.py --repeat 10 --json disconnect.json

A cluster of its own with the demo model. Clients ask through every gateway in turn, streaming and not, for one text
and for two at once (``n``); each closes its connection half a second later, while its texts are being written. Then
the engine is asked every 10 ms until it has no sequence, no row and no microbatch whose reports are still out, which
means that every stage has let go. Printed are the median and the longest time. The aim is a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record, soak
from benchmarks.idle import free_ports

AIM_SECONDS = 1.0
NODES = 3
STAY_SECONDS = 0.5
LOOK_SECONDS = 0.01
PATIENCE_SECONDS = 60.0
WORK = ("waiting", "prefilling", "decoding", "rows", "in_flight")


async def leave(gateway: str, *, stream: bool, texts: int) -> None:
    """Ask for more than can be written, and close the connection in the middle."""
    body = {"model": "demo", "prompt": "One two three", "max_tokens": 1500, "n": texts, "stream": stream}
    body |= {"temperature": 1, "seed": 7, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, trust_env=False) as client:
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(STAY_SECONDS),
                client.stream("POST", f"{gateway}/v1/completions", json=body) as answer,
            ):
                async for _ in answer.aiter_bytes():
                    pass
                raise SystemExit(f"the answer ended by itself: {answer.status_code}")


async def working(client: httpx.AsyncClient, cluster: soak.Cluster) -> dict[str, int]:
    engines = [e for api in cluster.node_apis for e in (await client.get(f"{api}/engines")).json()["engines"]]
    return {key: sum(engine[key] for engine in engines) for key in WORK}


async def measure(client: httpx.AsyncClient, cluster: soak.Cluster, gateway: str, stream: bool, texts: int) -> float:
    """Seconds until everything of one client is gone."""
    leaving = asyncio.create_task(leave(gateway, stream=stream, texts=texts))
    await asyncio.sleep(STAY_SECONDS / 2)
    if (rows := (await working(client, cluster))["rows"]) != texts:
        raise SystemExit(f"{rows} rows run for a client that asked for {texts}")
    await leaving
    left_at = time.perf_counter()
    while any((await working(client, cluster)).values()):
        if time.perf_counter() - left_at > PATIENCE_SECONDS:
            raise SystemExit(f"still running after {PATIENCE_SECONDS:g} s: {await working(client, cluster)}")
        await asyncio.sleep(LOOK_SECONDS)
    return time.perf_counter() - left_at


async def run(repeat: int) -> list[dict[str, Any]]:
    first = free_ports(100 * NODES + 400)
    async with (
        httpx.AsyncClient(timeout=PATIENCE_SECONDS, trust_env=False) as client,
        soak.cluster(NODES, first, first + 100 * NODES, client) as cluster,
    ):
        found = []
        for stream, texts in itertools.product((True, False), (1, 2)):
            seconds = [
                await measure(client, cluster, cluster.gateways[number % NODES], stream, texts)
                for number in range(repeat)
            ]
            found.append(
                {
                    "stream": stream,
                    "texts": texts,
                    "repeat": repeat,
                    "median_s": round(statistics.median(seconds), 3),
                    "longest_s": round(max(seconds), 3),
                }
            )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = asyncio.run(run(options.repeat))
    for result in results:
        what = "streaming" if result["stream"] else "not streaming"
        times = f"median {result['median_s']:.3f} s   longest {result['longest_s']:.3f} s"
        print(f"{what:<14} {result['texts']} text(s)   {times}")
    longest = max(result["longest_s"] for result in results)
    print(f"the aim of {AIM_SECONDS:g} s is {'met' if longest <= AIM_SECONDS else 'missed'}: at most {longest:.3f} s")
    record.save(options.json, "disconnect", results)


if __name__ == "__main__":
    main()
