"""Ours beside mlx-lm, in one run: same checkpoint, same BLAS, same load, each process with one BLAS thread.

    python benchmarks/peers.py --scenario quantized dense defaults prefill --repeat 3 --json peers.json

Systems: ours with one stage, ours with two (two local nodes), ``mlx_lm.server`` alone, ``mlx_lm.server --pipeline`` on
two ranks over the ring. Scenarios (about 100 M random parameters, Qwen2 architecture, 12 layers of width 768):

quantized  the 4-bit checkpoint with float32 scales for all, dequantizing off, 8 clients, 32 + 32 tokens
dense      the same weights as float32 for all, 64 clients, 32 + 32 tokens
defaults   the 4-bit checkpoint with bfloat16 scales, as shipped; everybody's defaults (ours casts and dequantizes)
prefill    dense, one client, a 1,024-token prompt in 128-token chunks: time to first token
clients-N  dense, with N = 1, 2, 8, 16 or 32 clients
quantized-N  as quantized, with N = 16 or 32 clients

The systems take turns within each repetition; figures are medians over the repetitions. Clients begin one after the
other, 50 ms apart. Each server gets three warm-up requests of the load's kind before it is measured. Two stages hold
six layers each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record, serve
from mlx_cluster.plan import even_counts
from mlx_cluster.stage import blas
from tests.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"layers": 12, "width": 768, "vocab": 8192}
START_SECONDS = 240
WARM_UP_REQUESTS = 3
LEAST_REQUESTS = 8  # a single request is no sample
RAMP_SECONDS = 0.05  # mlx_lm.server resets connections when more than five come at once


@dataclass(frozen=True, slots=True)
class Scenario:
    checkpoint: str
    clients: int
    prompt_tokens: int
    max_tokens: int
    ours: dict[str, str]  # environment of our nodes
    peers: tuple[str, ...] = ()  # arguments of mlx_lm.server
    systems: tuple[str, ...] = ("ours-1", "ours-2", "mlx_lm", "mlx_lm-pipeline")


NEVER = {"MLX_CLUSTER__RUNTIME__DEQUANTIZE": "never"}
CHUNKS_128 = {"MLX_CLUSTER__SCHEDULER__PREFILL_CHUNK": "128"}
SCENARIOS = {
    "quantized": Scenario("4bit-float32", 8, 32, 32, NEVER),
    "dense": Scenario("dense-float32", 64, 32, 32, {}),
    "defaults": Scenario("4bit-bfloat16", 8, 32, 32, {}),
    "prefill": Scenario("dense-float32", 1, 1024, 2, CHUNKS_128, ("--prefill-step-size", "128")),
}
for count in (1, 2, 8, 16, 32):
    SCENARIOS[f"clients-{count}"] = Scenario("dense-float32", count, 32, 32, {})
for count in (16, 32):
    SCENARIOS[f"quantized-{count}"] = Scenario("4bit-float32", count, 32, 32, NEVER)


def checkpoint(folder: Path, name: str) -> Path:
    """Write (once) one of the three checkpoints: the same random weights, differently stored."""
    path = folder / name
    if not (path / "config.json").exists():
        kind, dtype = name.split("-")
        write_tiny_model(path, **SHAPE, dtype=dtype, quantize_bits=4 if kind == "4bit" else None)
        _name_every_token(path / "tokenizer.json", SHAPE["vocab"])
    return path


def _name_every_token(tokenizer: Path, vocab: int) -> None:
    """Give every id a text of its own: random weights draw any id, and a token without text is no streamed event."""
    document = json.loads(tokenizer.read_text())
    names = document["model"]["vocab"]
    names |= {f"w{number}": number for number in range(len(names) + len(document["added_tokens"]), vocab)}
    tokenizer.write_text(json.dumps(document))


# -- the systems ---------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def ours(stages: int, model: Path, extra: dict[str, str]) -> tuple[list[subprocess.Popen[bytes]], str, str]:
    gateway = 20_000 + (os.getpid() * 7 + stages * 131) % 9000
    command = [sys.executable, "-m", "mlx_cluster", "up", "--model", str(model), "--nodes", str(stages)]
    command += ["--gateway-port", str(gateway), "--base-port", str(gateway + 100), "--alias", "peer"]
    if stages > 1:
        split = "/".join(map(str, even_counts(SHAPE["layers"], stages)))
        command += ["--transport", "grpc", "--split", split]
    env = {**os.environ, "MLX_CLUSTER__COORDINATOR__PORT": str(gateway + 90), **extra}
    return [_popen(command, env)], f"http://127.0.0.1:{gateway}/v1", "peer"


def mlx_lm(ranks: int, model: Path, extra: tuple[str, ...]) -> tuple[list[subprocess.Popen[bytes]], str, str]:
    port, *ring = free_ports(ranks + 1)
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port), *extra]
    command += ["--log-level", "ERROR"]
    env = {**os.environ, **blas.environment(blas.find(), threads=1)}
    if ranks == 1:
        return [_popen(command, env)], f"http://127.0.0.1:{port}/v1", "default_model"
    hosts = Path(tempfile.mkdtemp()) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ring]))
    env["MLX_HOSTFILE"] = str(hosts)
    processes = [_popen([*command, "--pipeline"], {**env, "MLX_RANK": str(rank)}) for rank in range(ranks)]
    return processes, f"http://127.0.0.1:{port}/v1", "default_model"


def _popen(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@contextlib.contextmanager
def running(system: str, model: Path, scenario: Scenario) -> Iterator[tuple[str, str]]:
    """Start a system, wait until it answers, and end its processes afterwards. Yields URL and model name."""
    kind, _, suffix = system.partition("-")
    if kind == "ours":
        processes, url, name = ours(int(suffix), model, scenario.ours)
    else:
        processes, url, name = mlx_lm(2 if suffix else 1, model, scenario.peers)
    try:
        _wait_until_it_answers(processes, url, name)
        yield url, name
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _wait_until_it_answers(processes: list[subprocess.Popen[bytes]], url: str, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    body = {"model": name, "prompt": "warm up", "max_tokens": 4, "temperature": 0}
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a process of {url} ended with {[p.poll() for p in processes]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"{url}/completions", json=body, timeout=120).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url} did not answer within {START_SECONDS} s")


# -- the runs ------------------------------------------------------------------------------------


def measure(name: str, scenario: Scenario, folder: Path, repeat: int) -> dict[str, Any]:
    model = checkpoint(folder, scenario.checkpoint)
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in scenario.systems}
    for repetition in range(repeat):
        for system in scenario.systems:
            with running(system, model, scenario) as (url, model_name):
                load = serve.Load(
                    url=url,
                    model=model_name,
                    clients=scenario.clients,
                    requests=max(scenario.clients, LEAST_REQUESTS),
                    prompt_tokens=scenario.prompt_tokens,
                    max_tokens=scenario.max_tokens,
                    characters_per_token=1.0,
                    seed=repetition + 1,
                    ramp_seconds=RAMP_SECONDS,
                )
                asyncio.run(serve.run(replace(load, clients=1, requests=WARM_UP_REQUESTS, seed=99)))
                figures = serve.summary(asyncio.run(serve.run(load)))
            print(f"{name:12} {system:16} {_line(figures)}", flush=True)
            runs[system].append(figures)
    medians = {system: _median(figures) for system, figures in runs.items()}
    return {"scenario": name, "load": f"{scenario.clients} clients", "medians": medians, "runs": runs}


def _line(figures: dict[str, Any]) -> str:
    if figures["errors"]:
        return f"{figures['errors']} of {figures['requests']} requests failed: {figures['first_error']}"
    return (
        f"{figures['tokens_per_second']:9.2f} tok/s   ttft {figures['ttft_ms']['median']:9.1f} ms   "
        f"tpot {figures['tpot_ms'].get('median', 0):8.2f} ms"
    )


def _median(runs: list[dict[str, Any]]) -> dict[str, float]:
    good = [figures for figures in runs if not figures["errors"]]
    if not good:
        return {}
    return {
        "tokens_per_second": statistics.median(f["tokens_per_second"] for f in good),
        "ttft_ms": statistics.median(f["ttft_ms"]["median"] for f in good),
        "tpot_ms": statistics.median(f["tpot_ms"].get("median", 0.0) for f in good),
    }


def ratios(result: dict[str, Any]) -> list[str]:
    """The comparisons that the scenario is there for, from its medians."""
    medians = result["medians"]
    field = "ttft_ms" if result["scenario"] == "prefill" else "tokens_per_second"

    def value(system: str) -> float | None:
        return medians.get(system, {}).get(field) if medians.get(system) else None

    lines = []
    for left, right in (
        ("ours-2", "ours-1"),
        ("ours-2", "mlx_lm-pipeline"),
        ("ours-1", "mlx_lm"),
        ("ours-2", "mlx_lm"),
    ):
        a, b = value(left), value(right)
        if a and b:
            lines.append(f"{result['scenario']:12} {field}: {left} / {right} = {a / b:.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=["quantized", "dense", "defaults"])
    parser.add_argument("--system", nargs="+", help="only these systems")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the checkpoints in (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with contextlib.ExitStack() as stack:
        folder = arguments.checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in arguments.scenario:
            scenario = SCENARIOS[name]
            if arguments.system:
                scenario = replace(scenario, systems=tuple(arguments.system))
            results.append(measure(name, scenario, folder, arguments.repeat))
    for result in results:
        print("\n".join(ratios(result)))
    record.save(arguments.json, "peers", results)


if __name__ == "__main__":
    main()
