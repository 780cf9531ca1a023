"""Hours of use in minutes: does memory reach a plateau, and are the books balanced when everybody has left?

    python benchmarks/soak.py --requests 2000 --clients 16 --json soak.json
    python benchmarks/soak.py --requests 2000 --emulated          # stages that sleep: EMULATION, no model's memory

Requests of mixed length (streams, whole answers, several choices, repeated and new beginnings, other keys), of which
``--cancel`` are left by their clients at a random moment, against ``mlx-cluster up`` with the demo model. Every process
is watched: printed is its resident memory by quarter of the run (the mean of samples, one a second). A process passes
when its last quarter is at most 3 % above its second one; the first fills the caches, which are kept small for that.

Then the idle audit: no row, no waiting sequence and no microbatch in the engine, no request in any gateway, no row on
any stage, and as many entries of the prefix cache on each stage as the engine believes. Exit code 1 if any of it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import emulated, record
from mlx_cluster.request import Sampling, SequenceRequest, Token
from mlx_cluster.stage.spec import EmulationSpec

ALLOWED_GROWTH = 1.03
QUARTERS = 4
START_SECONDS = 180.0
IDLE_SECONDS = 60.0
STALE_SECONDS = 3.0  # what the stages said last may be a second old
REQUEST_SECONDS = 300.0
SLEEP_SECONDS_PER_ROW = 0.001
WORDS = ("the", "pipeline", "keeps", "every", "machine", "busy", "while", "tokens", "flow", "and", "nobody", "waits")
# Bounds that are reached within the first quarter, so that what grows after it grows for another reason.
SETTINGS = (
    "runtime.prefix_cache.max_bytes=8MB",
    "api_gateway.max_concurrent_requests=256",
    "api_gateway.timeout=300",  # a slow machine is no failure here
)


@dataclass(frozen=True, slots=True)
class Load:
    requests: int
    clients: int
    cancel: float
    longest_prompt: int  # words
    longest_answer: int  # tokens
    seed: int

    def rng(self, index: int) -> random.Random:
        return random.Random(self.seed * 1_000_003 + index)


@dataclass(slots=True)
class Outcomes:
    counts: Counter[str] = field(default_factory=Counter)
    first_error: str = ""

    def error(self, text: str) -> None:
        self.counts["errors"] += 1
        self.first_error = self.first_error or text


# -- resident memory ----------------------------------------------------------------------------------


def resident_bytes(pids: list[int]) -> dict[int, int]:
    done = subprocess.run(
        ["ps", "-o", "pid=,rss=", "-p", ",".join(map(str, pids))],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    rows = (line.split() for line in done.stdout.splitlines())
    return {int(pid): int(kilobytes) * 1024 for pid, kilobytes in rows}


@dataclass(slots=True)
class Watch:
    """Samples the memory of the processes once a second, filed by the quarter of the run they fall into."""

    names: dict[int, str]
    quarter: Callable[[], int]
    samples: dict[int, list[list[int]]] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            for pid, num_bytes in (await asyncio.to_thread(resident_bytes, list(self.names))).items():
                quarters = self.samples.setdefault(pid, [[] for _ in range(QUARTERS)])
                quarters[self.quarter()].append(num_bytes)
            await asyncio.sleep(1.0)

    def table(self) -> list[dict[str, Any]]:
        rows = []
        for pid, quarters in self.samples.items():
            means = [round(statistics.fmean(q) / 1e6, 2) if q else None for q in quarters]
            second, last = means[1], means[-1]
            growth = last / second if second and last else None
            rows.append(
                {
                    "process": self.names[pid],
                    "mb_by_quarter": means,
                    "last_over_second": round(growth, 4) if growth else "too short a run",
                    "passes": growth is not None and growth <= ALLOWED_GROWTH,
                }
            )
        return sorted(rows, key=lambda row: str(row["process"]))


# -- the load -----------------------------------------------------------------------------------------


async def closed_loop(load: Load, one: Callable[[int], Awaitable[None]], progress: list[int]) -> None:
    """At most ``clients`` at once; ``progress[0]`` counts what has ended."""
    order = iter(range(load.requests))

    async def client() -> None:
        for index in order:
            await one(index)
            progress[0] += 1
            if progress[0] % max(1, load.requests // 20) == 0:
                print(f"  {progress[0]} of {load.requests}", file=sys.stderr, flush=True)

    await asyncio.gather(*(client() for _ in range(load.clients)))


def body_of(load: Load, index: int, model: str) -> dict[str, Any]:
    """One request: every third begins like others, some ask for several choices, some for a seed of their own."""
    rng = load.rng(index)
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, load.longest_prompt))]
    begin = f"conversation {rng.randrange(6)}: " + " ".join(WORDS * 4) if rng.random() < 0.34 else f"{rng.random():f}"
    body: dict[str, Any] = {
        "model": model,
        "prompt": f"{begin} {' '.join(words)}",
        "max_tokens": rng.randint(1, load.longest_answer),
        "temperature": rng.choice((0, 0, 0.8)),
        "stream": rng.random() < 0.7,
        "ignore_eos": True,
    }
    if rng.random() < 0.1:
        body["n"] = 2
    if rng.random() < 0.2:
        body["seed"] = rng.randrange(1000)
    if rng.random() < 0.1:
        body |= {"logprobs": 2, "frequency_penalty": 0.5}
    return body


async def http_request(client: httpx.AsyncClient, urls: list[str], load: Load, index: int, out: Outcomes) -> None:
    rng = load.rng(~index)
    body = body_of(load, index, "demo")
    headers = {"authorization": f"Bearer key-{rng.randrange(4)}"} if rng.random() < 0.5 else {}
    leaves_after = rng.expovariate(2.0) if rng.random() < load.cancel else None
    try:
        async with asyncio.timeout(leaves_after):
            url = f"{rng.choice(urls)}/v1/completions"
            async with client.stream("POST", url, json=body, headers=headers) as response:
                async for line in response.aiter_lines():
                    if '"error"' in line:
                        out.error(f"{response.status_code}: {line[:300]}")
                out.counts[str(response.status_code)] += 1
    except TimeoutError:
        out.counts["left"] += 1
    except httpx.HTTPError as error:
        out.error(f"{type(error).__name__}: {error}")


# -- a cluster of this machine ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cluster:
    view: dict[str, Any]

    @property
    def processes(self) -> dict[int, str]:
        nodes = {node["pid"]: f"agent of {node['name']}" for node in self.view["nodes"]}
        stages = self.view["pipelines"][0]["stages"]
        return nodes | {stage["pid"]: f"stage {index}" for index, stage in enumerate(stages)}

    @property
    def gateways(self) -> list[str]:
        return [node["gateway_url"] for node in self.view["nodes"]]

    @property
    def node_apis(self) -> list[str]:
        """In ``up``'s cluster the node API is four ports below the admin port."""
        urls = [httpx.URL(node["admin_url"]) for node in self.view["nodes"]]
        return [str(url.copy_with(port=(url.port or 0) - 4)).rstrip("/") for url in urls]


@contextlib.asynccontextmanager
async def cluster(nodes: int, base_port: int, gateway_port: int, client: httpx.AsyncClient) -> AsyncIterator[Cluster]:
    command = [sys.executable, "-m", "mlx_cluster", "up", "--model", "demo", "--nodes", str(nodes)]
    command += ["--base-port", str(base_port), "--gateway-port", str(gateway_port)]
    for setting in (*SETTINGS, f"coordinator.port={base_port + 300 + 100 * nodes}"):
        command += ["--set", setting]
    with tempfile.TemporaryFile() as output:
        process = await asyncio.to_thread(
            subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield Cluster(await _ready(process, f"http://127.0.0.1:{base_port + 4}/cluster", nodes, client))
        except BaseException:
            output.seek(0)
            print(output.read().decode(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            process.send_signal(signal.SIGINT)
            try:
                await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


async def _ready(process: subprocess.Popen[bytes], url: str, nodes: int, client: httpx.AsyncClient) -> dict[str, Any]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"mlx-cluster up ended with {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            view = (await client.get(url)).json()
            known = [node for node in view["nodes"] if node["gateway_url"]]
            if len(known) == nodes and view["pipelines"] and view["pipelines"][0]["state"] == "ready":
                return dict(view)
        await asyncio.sleep(0.5)
    raise SystemExit(f"the cluster was not ready within {START_SECONDS:g} s")


async def audit_of(cluster: Cluster, client: httpx.AsyncClient) -> list[str]:
    """What is not accounted for; empty when the books balance."""
    problems: list[str] = []
    engines: list[dict[str, Any]] = []
    for url in cluster.node_apis:
        engines += (await client.get(f"{url}/engines")).json()["engines"]
    if not engines:
        problems.append("no node drives an engine")
    for engine in engines:
        problems += books(engine)
    for url in cluster.gateways:
        running = (await client.get(f"{url}/health")).json()["requests_in_flight"]
        if running:
            problems.append(f"{running} requests in flight at {url}")
    return problems


def books(engine: dict[str, Any]) -> list[str]:
    """What is wrong with the figures of an engine that has nothing to do."""
    wrong = [
        f"{engine[key]} {key}" for key in ("waiting", "prefilling", "decoding", "rows", "in_flight") if engine[key]
    ]
    if engine["unaccounted"]:
        wrong.append(f"rows that nobody has: {engine['unaccounted']}")
    for index, held in enumerate(engine["held"]):
        if held is None:
            wrong.append(f"stage {index} has not said what it holds")
        elif list(held) != [0, engine["prefix_entries"]]:
            wrong.append(
                f"stage {index} holds {held[0]} rows and {held[1]} entries; the engine believes in "
                f"0 and {engine['prefix_entries']}"
            )
    return wrong


async def until_idle(audit: Callable[[], Awaitable[list[str]]]) -> list[str]:
    """The audit's last word: it has a minute to become empty, as the stages say what they hold once a second."""
    await asyncio.sleep(STALE_SECONDS)
    deadline = time.monotonic() + IDLE_SECONDS
    while (problems := await audit()) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    return problems


# -- the two kinds of run -----------------------------------------------------------------------------


async def real(load: Load, nodes: int, base_port: int, gateway_port: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=load.clients + 8)
    async with (
        httpx.AsyncClient(timeout=REQUEST_SECONDS, limits=limits, trust_env=False) as client,
        cluster(nodes, base_port, gateway_port, client) as running,
    ):
        out = Outcomes()
        return await soak(
            load,
            running.processes,
            lambda index: http_request(client, running.gateways, load, index, out),
            lambda: audit_of(running, client),
            out,
        )


async def asleep(load: Load, stages: int) -> dict[str, Any]:
    """Real stage processes whose devices sleep, and the engine in this process."""
    emulations = [EmulationSpec(seconds_per_row=SLEEP_SECONDS_PER_ROW)] * stages
    async with emulated.pipeline(emulations) as engine:
        out = Outcomes()

        async def one(index: int) -> None:
            rng = load.rng(index)
            prompt = tuple(rng.randrange(1000) for _ in range(rng.randint(1, 4 * load.longest_prompt)))
            request = SequenceRequest(
                str(index), "emulated", prompt, rng.randint(1, load.longest_answer), Sampling(seed=index)
            )
            leaves_at = rng.randrange(request.max_tokens) if rng.random() < load.cancel else None
            async with contextlib.aclosing(engine.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Token) and event.index == leaves_at:
                        out.counts["left"] += 1
                        return
            out.counts["whole"] += 1

        async def audit() -> list[str]:
            return books(engine.statistics())

        return await soak(load, _family(stages), one, audit, out)


def _family(stages: int) -> dict[int, str]:
    """This process and its children."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, timeout=20, check=True)
    pairs = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    children = sorted(pid for pid, parent in pairs if parent == os.getpid())
    alive = [pid for pid in children if resident_bytes([pid]).get(pid, 0) > 10_000_000]  # ps itself is one of them
    assert len(alive) == stages, f"{len(alive)} children, {stages} stages"
    return {os.getpid(): "engine and load"} | {pid: f"stage {index}" for index, pid in enumerate(alive)}


async def soak(
    load: Load,
    processes: dict[int, str],
    one: Callable[[int], Awaitable[None]],
    audit: Callable[[], Awaitable[list[str]]],
    out: Outcomes,
) -> dict[str, Any]:
    progress = [0]
    watch = Watch(processes, lambda: min(QUARTERS - 1, QUARTERS * progress[0] // load.requests))
    watching = asyncio.create_task(watch.run())
    began = time.monotonic()
    try:
        await closed_loop(load, one, progress)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    seconds = time.monotonic() - began
    problems = await until_idle(audit)
    memory = watch.table()
    missing = sorted(set(processes.values()) - {row["process"] for row in memory})
    return {
        "requests": load.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(out.counts),
        "first_error": out.first_error,
        "memory": memory,
        "not_watched": missing,
        "audit": problems,
        "passes": not problems and not missing and not out.counts["errors"] and all(row["passes"] for row in memory),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['requests']} requests in {result['seconds']} s: {result['outcomes']} {result['first_error']}")
    print(f"{'resident memory, MB':24} {'1st':>9} {'2nd':>9} {'3rd':>9} {'4th':>9}  4th/2nd")
    for row in result["memory"]:
        quarters = " ".join(f"{mb:9.1f}" if mb is not None else f"{'-':>9}" for mb in row["mb_by_quarter"])
        print(f"{row['process']:24} {quarters}  {row['last_over_second']}{'' if row['passes'] else '  FAILS'}")
    print("idle audit: " + ("; ".join(result["audit"]) or "every row, entry and request is accounted for"))
    print("passes" if result["passes"] else "FAILS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--cancel", type=float, default=0.25, help="part of the requests that their clients leave")
    parser.add_argument("--longest-prompt", type=int, default=200, help="words")
    parser.add_argument("--longest-answer", type=int, default=48, help="tokens")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--emulated", action="store_true", help="stages that sleep, one for each node")
    parser.add_argument("--base-port", type=int, default=9100)
    parser.add_argument("--gateway-port", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load = Load(
        arguments.requests,
        arguments.clients,
        arguments.cancel,
        arguments.longest_prompt,
        arguments.longest_answer,
        arguments.seed,
    )
    if arguments.emulated:
        result = asyncio.run(asleep(load, arguments.nodes))
    else:
        result = asyncio.run(real(load, arguments.nodes, arguments.base_port, arguments.gateway_port))
    result["kind"] = "emulated stages" if arguments.emulated else "demo model"
    show(result)
    record.save(arguments.json, "soak", result)
    if not result["passes"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
