"""Four real nodes under load, one role each, and what a cell of the fault matrix does to them.

Owns: the cluster's roles, the sixteen streams and what they must say, the signals, the restoring and the books.
Does not own: processes and ports (``e2e.cluster_processes``). The matrix multiplies with the reference BLAS, which
gives the same logits whatever shares a batch, so the reference of one quiet run holds for every recovery.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mlx_cluster import demo
from tests.e2e.cluster_processes import ClusterProcesses, alive, running, within

TOKENS = 96
SIGNAL_AFTER = 8
# The watchdog of a cell, the only duration that is asserted; a machine that does other work besides needs more.
CELL_SECONDS = float(os.environ.get("FAULTS_WATCHDOG_SECONDS", "60"))
# A gateway that says nothing for so long is given up by its clients; it sends a keep-alive every second.
SILENCE_SECONDS = 12.0
STANDBY, GATEWAY = 0, 3
QUESTIONS = (
    "Write a short poem about the sea.",
    "def fibonacci(n):",
    "Count from one to twenty.",
    "The capital of France is",
    "What is a pipeline?",
    "import asyncio",
    "Return the sum of a list.",
    "How do I open a file?",
)


@dataclass(slots=True)
class Stream:
    """One client: what it asks, what it has of the answer, and when each token came."""

    body: dict[str, Any]
    tokens: list[str] = field(default_factory=list)
    arrived_at: list[float] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_done: int = 0
    reconnects: int = 0

    def reset(self) -> None:
        """Begin anew; what came when is kept, for the client has waited all the same."""
        self.tokens, self.ends, self.errors, self.num_done = [], [], [], 0

    def longest_gap(self, after: float) -> tuple[float, float]:
        """(seconds, end) of the longest pause between two tokens that ends after this moment."""
        pairs = zip(self.arrived_at, self.arrived_at[1:], strict=False)
        return max(((b - a, b) for a, b in pairs if b > after), default=(0.0, after))


def bodies() -> list[dict[str, Any]]:
    """8 greedy and 8 seeded requests; the log probabilities make one list entry of every token."""
    shared = {"model": "tiny", "max_tokens": TOKENS, "stream": True, "ignore_eos": True, "logprobs": 0}
    greedy = [{**shared, "prompt": prompt, "temperature": 0} for prompt in QUESTIONS]
    drawn = [{**shared, "prompt": p, "temperature": 0.9, "seed": 1000 + i} for i, p in enumerate(QUESTIONS)]
    return [*greedy, *drawn]


async def _read(stream: Stream, urls: list[str], progress: Callable[[], None]) -> None:
    """Read the answer to its end; a client whose gateway dies asks the next one for the whole of it again."""
    for url in [*urls, urls[-1]]:
        try:
            await _read_from(stream, url, progress)
            return
        except httpx.TransportError:
            stream.reset()
            stream.reconnects += 1
    raise AssertionError(f"no gateway of {urls} could be reached")


async def _read_from(stream: Stream, url: str, progress: Callable[[], None]) -> None:
    async with (
        httpx.AsyncClient(timeout=CELL_SECONDS, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=stream.body) as answer,
    ):
        assert answer.status_code == 200, (await answer.aread()).decode()
        async for line in _lines(answer):
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                stream.num_done += 1
                continue
            event = json.loads(data)
            if "error" in event:
                stream.errors.append(event["error"]["message"])
                continue
            for choice in event["choices"]:
                new = choice["logprobs"]["tokens"] if choice.get("logprobs") else []
                stream.tokens += new
                stream.arrived_at += [time.monotonic()] * len(new)
                if choice["finish_reason"]:
                    stream.ends.append(choice["finish_reason"])
            progress()


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """The lines of an answer that has begun. Raises ``httpx.ReadTimeout`` when nothing at all comes."""
    lines = answer.aiter_lines()
    while True:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                line = await anext(lines)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise httpx.ReadTimeout(f"nothing came for {SILENCE_SECONDS:g} s") from None
        yield line


async def _load(
    urls: list[str], strike: Callable[[], None] | None, asked: Sequence[dict[str, Any]], seconds: float
) -> list[Stream]:
    streams = [Stream(body) for body in asked]
    struck = False

    def progress() -> None:
        nonlocal struck
        if strike is not None and not struck and all(len(s.tokens) >= SIGNAL_AFTER for s in streams):
            struck = True
            strike()

    async with asyncio.timeout(seconds):
        await asyncio.gather(*(_read(stream, urls, progress) for stream in streams))
    assert struck or strike is None, "the streams ended before the signal"
    return streams


def load(
    urls: list[str],
    strike: Callable[[], None] | None = None,
    asked: Sequence[dict[str, Any]] | None = None,
    seconds: float = CELL_SECONDS,
) -> list[Stream]:
    """All streams at once, to their ends; ``strike`` is called when each of them has had ``SIGNAL_AFTER`` tokens.

    ``asked`` are the bodies that they send, by default all sixteen. Raises ``TimeoutError`` after ``seconds``.
    """
    return asyncio.run(_load(urls, strike, bodies() if asked is None else asked, seconds))


@dataclass(slots=True)
class Fleet:
    """A running cluster, the reference tokens of its streams, and the stage processes it has ever had."""

    cluster: ClusterProcesses
    split: str
    reference: list[list[str]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    struck_at: float = 0.0  # when the last signal but SIGCONT was sent, monotonic

    @property
    def wanted(self) -> list[tuple[int, int]]:
        """(node, layers) of each stage."""
        return [(node, int(count)) for node, count in enumerate(self.split.split("/")) if int(count)]

    def urls(self, first: int = GATEWAY) -> list[str]:
        """The gateways that clients try, in this order."""
        return [self.cluster.gateway(first), self.cluster.gateway(STANDBY)]

    def lead(self, node: int) -> None:
        """Have this node coordinate, and wait until every node says so and the books balance."""
        self.balanced()
        admin = f"http://127.0.0.1:{self.cluster.first_port + 5 * STANDBY + 4}/coordinator"

        def pinned() -> bool:
            # Refused while an election goes on: the last cell may have taken the coordinator.
            wish = {"node": self.cluster.name(node)}
            return httpx.post(admin, json=wish, timeout=CELL_SECONDS, trust_env=False).is_success

        within(f"node {node} is to coordinate", pinned, CELL_SECONDS)

        def probe() -> bool:
            pictures = [self.cluster.admin(node=each) for each in range(self.cluster.num_nodes)]
            return all(picture and picture["coordinator"]["node_id"] == node for picture in pictures)

        within(f"node {node} coordinates", probe, CELL_SECONDS)
        self.balanced()

    def stages(self) -> list[dict[str, Any]]:
        return list(self.balanced()["stages"])

    def stage_pids(self, node: int) -> list[int]:
        return [int(s["pid"]) for s in self.stages() if s["node_id"] == node]

    def balanced(self, *, busy: bool = False) -> dict[str, Any]:
        """The pipeline, once all nodes live, agree on it, and hold just the stages that were asked for.

        ``busy``: any stages will do, for under load a pipeline does not move back to where it was.
        """

        def probe() -> dict[str, Any] | None:
            found = [self._pipeline_of(self.cluster.admin(node=node), busy) for node in range(self.cluster.num_nodes)]
            return found[0] if all(found) and len({each["epoch"] for each in found if each}) == 1 else None

        pipeline = within("the books balance", probe, CELL_SECONDS)
        self.seen |= {int(s["pid"]) for s in pipeline["stages"]}
        return pipeline

    def _pipeline_of(self, picture: dict[str, Any] | None, busy: bool) -> dict[str, Any] | None:
        """The pipeline of a node's picture in which everything is as it should be."""
        if picture is None or len(picture["pipelines"]) != 1 or any(n["state"] != "alive" for n in picture["nodes"]):
            return None
        pipeline: dict[str, Any] = picture["pipelines"][0]
        stages = pipeline["stages"]
        held = [(s["node_id"], s["end"] - s["start"]) for s in stages]
        ready = pipeline["state"] == "ready" and all(s["pid"] for s in stages)
        return pipeline if ready and (busy or held == self.wanted) else None

    def check_no_orphans(self) -> None:
        """Of all stage processes there ever were, only the present ones live."""
        present = {int(s["pid"]) for s in self.stages()}
        within("no orphan", lambda: not any(map(alive, self.seen - present)) or None, 20.0)

    def pictures(self) -> list[dict[str, Any]]:
        """``GET /cluster`` of every node that answers."""
        asked = (self.cluster.admin(node=node) for node in range(self.cluster.num_nodes))
        return [picture for picture in asked if picture is not None]

    def figures(self, node: int) -> dict[str, Any]:
        """What the engine on this node says of itself."""
        answer = self.cluster.admin("/engines", node=node, offset=0)
        assert answer is not None, f"node {node} does not answer"
        (engine,) = answer["engines"]
        return dict(engine)

    def send(self, number: signal.Signals, pids: list[int]) -> None:
        if number is not signal.SIGCONT:
            self.struck_at = time.monotonic()
        for pid in pids:
            os.kill(pid, number)

    def check(self, streams: list[Stream]) -> None:
        for index, (stream, reference) in enumerate(zip(streams, self.reference, strict=True)):
            assert stream.errors == [], f"stream {index}"
            assert stream.tokens == reference, f"stream {index} differs from the quiet run"
            assert (stream.ends, stream.num_done) == (["length"], 1), f"stream {index}"

    def strike(
        self,
        node: int,
        number: signal.Signals,
        pids: list[int],
        first: int = GATEWAY,
        just_before: Callable[[], None] = lambda: None,
    ) -> list[Stream]:
        """What the streams saw of a signal to processes of this node, which is brought back afterwards."""

        def strike() -> None:
            just_before()
            self.send(number, pids)

        try:
            streams = load(self.urls(first), strike)
            if number is signal.SIGSTOP:
                within(f"the others go on without node {node}", lambda: self._goes_on_without(node), CELL_SECONDS)
        finally:
            self._restore(node, number, pids)
        return streams

    def _goes_on_without(self, node: int) -> bool:
        """Whether the others know that this node is gone, and it neither coordinates nor holds a stage."""
        picture = self.cluster.admin(node=STANDBY if node != STANDBY else GATEWAY)
        if picture is None or not picture["pipelines"]:
            return False
        alive_nodes = {each["node_id"] for each in picture["nodes"] if each["state"] == "alive"}
        holders = {stage["node_id"] for pipeline in picture["pipelines"] for stage in pipeline["stages"]}
        return node not in {*alive_nodes, *holders, picture["coordinator"]["node_id"]}

    def _restore(self, node: int, number: signal.Signals, pids: list[int]) -> None:
        if number is signal.SIGSTOP:
            self.send(signal.SIGCONT, [pid for pid in pids if alive(pid)])
            return
        self._start_again(node)

    def restart(self, node: int) -> None:
        """Tell a node to go, and start it again when it has gone."""
        self.send(signal.SIGTERM, [self.cluster.processes[node].pid])
        self._start_again(node)

    def _start_again(self, node: int) -> None:
        process = self.cluster.processes.pop(node)
        try:
            process.wait(CELL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(CELL_SECONDS)
            raise
        finally:
            self.cluster.start(node)


@contextmanager
def fleet(
    folder: Path, split: str, transport: str = "grpc", changes: dict[str, dict[str, Any]] | None = None
) -> Iterator[Fleet]:
    """A cluster of as many nodes as the split names, its reference taken from a run in which nothing happens.

    ``changes`` are settings by section.
    """
    settings: dict[str, Any] = {
        "runtime": {"blas": "off"},
        "api_gateway": {"recovery_timeout": CELL_SECONDS, "keepalive_seconds": 1.0},
        "network": {"transport": transport},
        "coordinator": {"quiet_period": 0.5},  # a cell begins when everything is where it was
        "log": {"level": "info"},
    }
    cluster = ClusterProcesses(
        folder, demo.model_dir(), num_nodes=len(split.split("/")), split=split, settings=settings
    )
    cluster.amend(changes or {})
    with running(cluster):
        made = Fleet(cluster, split)
        made.balanced()
        streams = load(made.urls())
        made.reference = [stream.tokens for stream in streams]
        assert all(len(tokens) == TOKENS for tokens in made.reference)
        made.check(load(made.urls()))
        yield made
