"""What the gateway itself costs: idle connections, many streams, time to first token, CPU for each streamed token.

    python benchmarks/gateway.py --json gateway.json           # 1,000 idle connections, 200 streams at 20 tokens/s each
    python benchmarks/gateway.py --mlx-lm                      # beside it: mlx_lm.server and ours on one tiny model

The gateway runs in a process of its own, with everything of a node's gateway but the engine: behind the real seam
(``request.Engine``) stands a source that hands tokens out at a given rate, in steps of eight rows as an engine's
reports do. The clients are a second process. Each stream asks for ``--tokens`` tokens and asks again when it has them.

TTFT is the time from sending a request to its first token; the source gives that at once, so all of it is the
gateway's (and the client's). CPU per token is the gateway process's CPU time over the tokens it streamed, requests of a
new connection each included; two lengths of answer tell the cost of a request from that of a token. The source's
share is measured alone, and printed, not subtracted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record
from mlx_cluster import log
from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.request import Admitted, Event, Finished, SequenceRequest, ServedModel, Token

ROWS_OF_A_STEP = 8
DEMO = Path(__file__).resolve().parents[1] / "mlx_cluster" / "demo" / "model"
START_SECONDS = 120
_EMPTY = re.compile(rb'"content": ?(""|null)')
REQUEST_SECONDS = 120


def raise_file_limit(wanted: int = 4096) -> None:
    """As many open files as this process may have; a library of mlx-lm sets the limit to 2,048 when it is imported."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# -- the gateway's process -------------------------------------------------------------------------------


@dataclass(slots=True)
class Source:
    """Implements ``request.Engine``: one token a ``1 / rate`` seconds for every stream, in steps of a few rows."""

    rate: float
    num_tokens: int = 0
    steps: list[list[asyncio.Queue[None]]] = field(default_factory=list)
    tickers: list[asyncio.Task[None]] = field(default_factory=list)

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        due: asyncio.Queue[None] = asyncio.Queue()
        step = self._join(due)
        try:
            yield Admitted()
            due.put_nowait(None)  # the first token comes at once
            for index in range(request.max_tokens):
                await due.get()
                self.num_tokens += 1
                yield Token(index, 262 + (index * 7) % 1000)
            yield Finished("length", len(request.prompt), request.max_tokens)
        finally:
            step.remove(due)

    def _join(self, due: asyncio.Queue[None]) -> list[asyncio.Queue[None]]:
        for step in self.steps:
            if len(step) < ROWS_OF_A_STEP:
                step.append(due)
                return step
        self.steps.append([due])
        self.tickers.append(asyncio.create_task(self._tick(self.steps[-1])))
        return self.steps[-1]

    async def _tick(self, step: list[asyncio.Queue[None]]) -> None:
        due_at = asyncio.get_running_loop().time()
        while True:
            due_at += 1 / self.rate
            await asyncio.sleep(due_at - asyncio.get_running_loop().time())
            for row in step:
                row.put_nowait(None)


class OneModel:
    """Implements ``request.Routes``."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def models(self) -> list[ServedModel]:
        return [ServedModel("demo", (), str(DEMO), 2048, 0, "ready")]

    def engine_for(self, model_id: str) -> Source:
        return self._source


async def serve(rate: float) -> None:
    """Print the port, then answer each line on stdin with CPU seconds and tokens so far; the end of it is the end."""
    from mlx_cluster.gateway.app import NodeInfo, create_app
    from mlx_cluster.gateway.server import GatewayServer

    log.configure()  # to stderr; the lines of each request are part of the cost
    source = Source(rate)
    settings = ApiGatewaySection(max_concurrent_requests=10_000)
    app = create_app(OneModel(source), settings, NodeInfo(0, "bench"))
    await app.state.gateway.catalogue.warm()
    raise_file_limit()
    alone = await _source_alone(rate)
    server = GatewayServer(app, "127.0.0.1", 0)
    await server.start()
    print(json.dumps({"port": server.port, "source_cpu_us": alone}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps({"cpu": time.process_time(), "tokens": source.num_tokens}), flush=True)
    await server.stop(0)


async def _source_alone(rate: float, streams: int = 64, tokens: int = 40) -> float:
    """Microseconds of CPU that the source itself takes for a token."""
    from mlx_cluster.request import Sampling

    source = Source(max(rate, 40.0))

    async def drain() -> None:
        request = SequenceRequest("x", "demo", (1,), tokens, Sampling())
        async for _ in source.generate(request):
            pass

    before = time.process_time()
    await asyncio.gather(*(drain() for _ in range(streams)))
    for ticker in source.tickers:
        ticker.cancel()
    return round((time.process_time() - before) / source.num_tokens * 1e6, 1)


# -- the clients' process --------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What the clients saw; seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    requests: int = 0
    errors: list[str] = field(default_factory=list)


async def one_stream(port: int, body: bytes, seen: Seen) -> None:
    """One request over a connection of its own, read as cheaply as possible."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    try:
        sent = time.perf_counter()
        writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        last = 0.0
        rest = b""
        async with asyncio.timeout(REQUEST_SECONDS):
            while data := await reader.read(65536):
                now = time.perf_counter()
                *lines, rest = (rest + data).split(b"\n")
                # Some servers name the role in every chunk; chunks without text are no tokens.
                count = sum(1 for line in lines if b'"content":' in line and not _EMPTY.search(line))
                if count:
                    if not last:
                        seen.first.append(now - sent)
                    else:
                        seen.gaps.append(now - last)
                    last = now
                    seen.tokens += count
                if any(line.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5", b'data: {"error"')) for line in lines):
                    seen.errors.append(data[:200].decode(errors="replace"))
                if b"data: [DONE]" in lines or b"data: [DONE]\r" in lines:
                    break
            else:
                seen.errors.append("the stream ended early")
    except (OSError, TimeoutError) as error:
        seen.errors.append(repr(error))
    finally:
        seen.requests += 1
        writer.close()


async def load(port: int, streams: int, tokens: int, seconds: float, model: str, stagger: float) -> Seen:
    """Keep ``streams`` streams going for this long; those under way at the end are cut."""
    text = "The pipeline keeps every machine busy."
    seen = Seen()

    async def client(number: int) -> None:
        await asyncio.sleep(stagger * number / streams)
        body = {"model": model, "stream": True, "max_tokens": tokens, "ignore_eos": True}
        for turn in range(1_000_000):
            asked = [{"role": "user", "content": f"{text} {number} {turn}"}]
            await one_stream(port, json.dumps({**body, "messages": asked}).encode(), seen)

    tasks = [asyncio.create_task(client(number)) for number in range(streams)]
    await asyncio.sleep(seconds)
    ended = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    seen.errors += [repr(task.exception()) for task in ended if not task.cancelled()]
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def idle_connections(port: int, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connections that asked once and now wait."""
    made = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /livez HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n".encode())
        await reader.readuntil(b"ok\n")
        made.append((reader, writer))
    return made


@dataclass(frozen=True, slots=True)
class Figures:
    system: str
    streams: int
    idle: int
    errors: int
    requests: int
    tokens_per_second: float
    ttft_ms_median: float
    ttft_ms_p99: float
    gap_ms_p99: float
    cpu_us_per_token: float
    idle_lost: int = 0
    source_cpu_us: float = 0.0
    first_error: str = ""


def _at(values: list[float], q: float) -> float:
    return round(1000 * sorted(values)[min(len(values) - 1, int(q * len(values)))], 2) if values else 0.0


def figures(system: str, seen: Seen, seconds: float, cpu: float, tokens: int, **more: Any) -> Figures:
    return Figures(
        system=system,
        errors=len(seen.errors),
        requests=seen.requests,
        tokens_per_second=round(seen.tokens / seconds, 1),
        ttft_ms_median=round(1000 * statistics.median(seen.first), 2) if seen.first else 0.0,
        ttft_ms_p99=_at(seen.first, 0.99),
        gap_ms_p99=_at(seen.gaps, 0.99),
        cpu_us_per_token=round(cpu / max(1, tokens) * 1e6, 1),
        first_error=seen.errors[0] if seen.errors else "",
        **more,
    )


async def measure_gateway(arguments: argparse.Namespace, tokens: int) -> Figures:
    raise_file_limit()
    command = [sys.executable, __file__, "--serve", "--rate", str(arguments.rate)]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def used() -> dict[str, Any]:
        stdin.write(b"\n")
        return dict(json.loads(await asyncio.wait_for(stdout.readline(), 60)))

    try:
        started = json.loads(await asyncio.wait_for(stdout.readline(), START_SECONDS))
        port = started["port"]
        idle = await idle_connections(port, arguments.idle)
        period = tokens / arguments.rate
        seconds = period + arguments.seconds  # the streams come evenly over the first period
        await load(port, min(8, arguments.streams), 8, 2.0, "demo", 0.1)
        before = await used()
        seen = await load(port, arguments.streams, tokens, seconds, "demo", period)
        after = await used()
        lost = sum(1 for reader, _ in idle if reader.at_eof())
        for _, writer in idle:
            writer.close()
        return figures(
            f"gateway alone, {tokens} tokens",
            seen,
            seconds,
            after["cpu"] - before["cpu"],
            after["tokens"] - before["tokens"],
            streams=arguments.streams,
            idle=arguments.idle,
            idle_lost=lost,
            source_cpu_us=started["source_cpu_us"],
        )
    finally:
        stdin.close()
        await asyncio.wait_for(process.wait(), 60)


# -- the peers -------------------------------------------------------------------------------------------


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process and all below it (Linux)."""
    total, waiting = 0.0, [pid]
    while waiting:
        each = waiting.pop()
        with contextlib.suppress(OSError):
            values = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
            for children in Path(f"/proc/{each}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
    return total


@contextlib.contextmanager
def peer(system: str) -> Iterator[tuple[int, int, str]]:
    """A server of the demo model: its pid, port and name of the model."""
    from benchmarks import peers

    blank = peers.Scenario("", 1, 1, 1, {})
    processes, url, model = peers.mlx_lm(1, DEMO, ()) if system == "mlx_lm.server" else peers.ours(1, DEMO, blank.ours)
    try:
        peers._wait_until_it_answers(processes, url, model)
        yield processes[0].pid, int(url.split(":")[2].split("/")[0]), model
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            if process.poll() is None:
                process.kill()
                process.wait(15)


def measure_peer(system: str, arguments: argparse.Namespace) -> Figures:
    with peer(system) as (pid, port, model):
        streams = arguments.peer_streams
        asyncio.run(load(port, streams, 16, 3.0, model, 0.1))
        before = _cpu_of(pid)
        seen = asyncio.run(load(port, streams, arguments.tokens[0], arguments.seconds, model, 0.5))
        cpu = _cpu_of(pid) - before
    return figures(system, seen, arguments.seconds, cpu, seen.tokens, streams=streams, idle=0)


def split_cost(alone: list[Figures], lengths: list[int]) -> tuple[float, float]:
    """(µs for a request, µs for each token), from the shortest and the longest requests."""
    by_length = sorted(zip(lengths, (row.cpu_us_per_token for row in alone), strict=True))
    (short, dear), (long, cheap) = by_length[0], by_length[-1]
    request = (dear - cheap) / (1 / short - 1 / long)
    return request, dear - request / short


def table(rows: list[Figures]) -> str:
    lines = [
        "| system | streams | idle | errors | tokens/s | TTFT median / p99 | gap p99 | CPU per token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.system} | {row.streams} | {row.idle} | {row.errors} | {row.tokens_per_second:,.0f} | "
            f"{row.ttft_ms_median:.1f} / {row.ttft_ms_p99:.1f} ms | {row.gap_ms_p99:.1f} ms | "
            f"{row.cpu_us_per_token:.0f} µs |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of each stream")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 400], help="of each request; a run for each")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--mlx-lm", action="store_true", help="also mlx_lm.server, and ours, on the demo model")
    parser.add_argument("--peer-streams", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.rate))
        return
    alone = [asyncio.run(measure_gateway(arguments, tokens)) for tokens in arguments.tokens]
    rows = list(alone)
    if arguments.mlx_lm:
        rows += [measure_peer("ours, 1 stage", arguments), measure_peer("mlx_lm.server", arguments)]
    print(table(rows))
    print(f"\nThe source's own share of the gateway's CPU: {alone[0].source_cpu_us} µs a token.")
    if len(alone) > 1:
        request_us, token_us = split_cost(alone, arguments.tokens)
        print(f"By these lengths a request costs {request_us / 1000:.1f} ms and each of its tokens {token_us:.0f} µs.")
    if len(rows) > len(alone):
        print("CPU per token of the two servers includes the model's computation (4 M parameters).")
    for row in rows:
        if row.errors:
            print(f"{row.system}: first error: {row.first_error}")
    record.save(arguments.json, "gateway", [asdict(row) for row in rows])
    sys.exit(1 if any(row.errors or row.idle_lost for row in alone) else 0)


if __name__ == "__main__":
    main()
