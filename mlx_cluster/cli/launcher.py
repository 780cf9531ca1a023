"""The local cluster's parent process: starts the nodes, waits until they serve, ends them.

Owns: the nodes as child processes from first to last. Does not own: what their settings are (``cli.compose``).
Invariant: whatever ends ``serve`` (a signal, an error, a dead node), no node is left after ``STOP_SECONDS``; if this
process is killed, its nodes end by their lifelines.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlx_cluster import lifeline
from mlx_cluster.cli.view import ClusterView, PipelineView, ask_cluster, progress_text, ready_line
from mlx_cluster.config.names import node_name
from mlx_cluster.config.ports import plan_ports
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import Unavailable

# From SIGINT (all nodes end together, so none drains) to SIGKILL; with reading the last words a stop stays below 5.
STOP_SECONDS = 4.0
POLL_SECONDS = 0.25
FAILED_SECONDS = 6.0  # a pipeline that stays failed this long before it was ever ready will not come up
WITNESS = "the witness"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where the launcher speaks: ``result`` for the ready line, ``notice`` for lines, ``progress`` for what changes."""

    result: Callable[[str], None]
    notice: Callable[[str], None]
    progress: Callable[[str], None]


@dataclass(slots=True)
class _Node:
    name: str
    child: lifeline.Child
    ended: asyncio.Task[lifeline.Exit]


@dataclass(slots=True)
class _Stop:
    """Set by the first signal; the second one ends everything at once."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    kill: Callable[[], None] = lambda: None

    def on_signal(self) -> None:
        if self.asked.is_set():
            self.kill()
        self.asked.set()


async def serve(
    settings: Settings, commands: Mapping[str, Sequence[str]], terminal: Terminal, stop_seconds: float = STOP_SECONDS
) -> int:
    """Run the ``commands`` (name → command line of a node) until a signal comes or none is left; an exit code.

    Raises ``ClusterError`` when a node dies or a model fails before the cluster is ready.
    """
    stop = _Stop()
    with _signals(stop):
        async with _nodes(settings, commands, terminal, stop, stop_seconds) as nodes:
            bring_up = asyncio.create_task(_wait_until_ready(settings, nodes, terminal))
            asked = asyncio.create_task(stop.asked.wait())
            try:
                await asyncio.wait([bring_up, asked], return_when=asyncio.FIRST_COMPLETED)
                if not bring_up.done():
                    return 0
                terminal.result(await bring_up)
                return await _watch(nodes, asked, terminal)
            finally:
                for task in (bring_up, asked):
                    task.cancel()
                await asyncio.gather(bring_up, asked, return_exceptions=True)


async def _watch(nodes: Sequence[_Node], asked: asyncio.Task[Literal[True]], terminal: Terminal) -> int:
    """Tell of nodes that end, until a signal comes (0) or none but the witness is left (1)."""
    running = list(nodes)
    while any(node.name != WITNESS for node in running) and not asked.done():
        await asyncio.wait([asked, *(node.ended for node in running)], return_when=asyncio.FIRST_COMPLETED)
        ended = [node for node in running if node.ended.done()]
        running = [node for node in running if not node.ended.done()]
        left = ", ".join(node.name for node in running if node.name != WITNESS) or "no node"
        for node in ended if not asked.done() else ():
            terminal.notice(f"{node.name} {lifeline.describe_code(node.ended.result().code)}; {left} left")
    return 0 if asked.done() else 1


# -- children -----------------------------------------------------------------------------------------


def node_command(run_dir: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "mlx_cluster", "node", "--config", str(run_dir), "--id", name, "--lifeline"]


def witness_command(run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "mlx_cluster", "witness", "--config", str(run_dir), "--lifeline"]


def commands_of(settings: Settings, run_dir: Path) -> dict[str, list[str]]:
    """Name → command line: one child per node, or a single mpirun that starts them as its ranks; and the witness."""
    witness = {WITNESS: witness_command(run_dir)} if settings.cluster.witness is not None else {}
    names = [node_name(entry) for entry in settings.cluster.nodes]
    if settings.network.transport != "mpi":
        return {**{name: node_command(run_dir, name) for name in names}, **witness}
    from mlx_cluster.cli.mpirun import guarded_mpirun

    rank = [sys.executable, "-m", "mlx_cluster.node.mpi", "--config", str(run_dir)]
    return {"mpirun": guarded_mpirun(len(names), rank), **witness}


@contextlib.asynccontextmanager
async def _nodes(
    settings: Settings,
    commands: Mapping[str, Sequence[str]],
    terminal: Terminal,
    stop: _Stop,
    stop_seconds: float,
) -> AsyncIterator[Sequence[_Node]]:
    nodes: list[_Node] = []

    def kill() -> None:
        for node in nodes:
            node.child.kill()

    stop.kill = kill
    try:
        for name, argv in commands.items():
            say = _prefixed(name, terminal, quiet_from=None if settings.log.level in ("debug", "info") else stop.asked)
            child = await lifeline.spawn(argv, env=_environment(), stderr="tail", on_line=say, on_error_line=say)
            nodes.append(_Node(name, child, asyncio.create_task(child.wait())))
        yield nodes
    finally:
        # Shielded from a second cancellation by being the last thing that runs; every stop has its own deadline.
        await asyncio.gather(*(node.child.stop(stop_seconds, signal.SIGINT) for node in nodes), return_exceptions=True)
        await asyncio.gather(*(node.ended for node in nodes), return_exceptions=True)


def _environment() -> dict[str, str]:
    # Nodes write through a pipe: without this, Python would keep their lines until a buffer is full.
    return {"PYTHONUNBUFFERED": "1"}


def _prefixed(name: str, terminal: Terminal, quiet_from: asyncio.Event | None) -> Callable[[str], None]:
    """Passes a node's lines on. Once a stop is asked for, nodes that lose each other are no news."""

    def say(line: str) -> None:
        if quiet_from is None or not quiet_from.is_set():
            terminal.notice(f"{name} | {line}")

    return say


@contextlib.contextmanager
def _signals(stop: _Stop) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.on_signal)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


# -- bring-up -----------------------------------------------------------------------------------------


async def _wait_until_ready(settings: Settings, nodes: Sequence[_Node], terminal: Terminal) -> str:
    """The ready line. Raises ``Unavailable`` with the reason when it cannot come."""
    import httpx

    ports = plan_ports(settings)
    urls = [f"http://{entry.host}:{ports[entry.node_id].admin}" for entry in settings.cluster.nodes]
    models = list(settings.models)
    patience = _Patience(settings.runtime.load_timeout)
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        while True:
            _check_running(nodes)
            view = await ask_cluster(client, urls)
            terminal.progress(progress_text(view, models))
            ready = _ready(view, models)
            if view is not None and ready is not None:
                return ready_line(f"{_gateway_url(settings)}/v1", ready)
            patience.check(view, time.monotonic())
            await asyncio.sleep(POLL_SECONDS)


def _ready(view: ClusterView | None, models: Sequence[str]) -> list[PipelineView] | None:
    """The pipelines of all models, in order, once every one of them is ready."""
    known = {pipeline.model: pipeline for pipeline in view.pipelines if pipeline.state == "ready"} if view else {}
    return [known[model] for model in models] if all(model in known for model in models) else None


def _gateway_url(settings: Settings) -> str:
    first = min(settings.cluster.nodes, key=lambda entry: entry.node_id)
    return f"http://{settings.api_gateway.host}:{plan_ports(settings)[first.node_id].gateway}"


def _check_running(nodes: Sequence[_Node]) -> None:
    for node in nodes:
        if node.ended.done():
            ended = node.ended.result()
            # All its lines were shown as they came; the last one mostly is the reason.
            last = ended.stderr_tail.strip().rpartition("\n")[2]
            words = f": {last}" if last else ""
            raise Unavailable(f"{node.name} {lifeline.describe_code(ended.code)} before the cluster was ready{words}")


class _Patience:
    """How long a bring-up may stand still, or stay failed. Time is handed in."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._last: ClusterView | None = None
        self._changed: float | None = None
        self._failed_since: float | None = None

    def check(self, view: ClusterView | None, now: float) -> None:
        """Raise ``Unavailable`` when waiting longer makes no sense."""
        if self._changed is None or view != self._last:
            self._last, self._changed = view, now
        failed = [p for p in view.pipelines if p.state == "failed"] if view is not None else []
        if not failed:
            self._failed_since = None
        elif self._failed_since is None:
            self._failed_since = now
        elif now - self._failed_since > FAILED_SECONDS:
            raise Unavailable(f"{failed[0].model} cannot be served: {failed[0].detail or 'no reason given'}")
        if now - self._changed > self._stall_seconds:
            raise Unavailable(
                f"nothing has changed for {self._stall_seconds:g} s ({progress_text(view, [])}): "
                "raise runtime.load_timeout if the machine is only slow, or look at --verbose"
            )
