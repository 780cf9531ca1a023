"""The launcher with small stand-ins for nodes: ready, death before and after, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_cluster.cli.launcher import Terminal, _Patience, commands_of, serve
from mlx_cluster.cli.view import ClusterView, PipelineView
from mlx_cluster.config.load import load
from mlx_cluster.config.schema import Settings
from mlx_cluster.config.simulated import simulated_settings
from mlx_cluster.errors import Unavailable

# A node that only has an admin port: it answers GET /cluster with what it was given, until SIGTERM.
NODE = """
import http.server, json, signal, sys
port, answer = int(sys.argv[1]), sys.argv[2].encode()
class Admin(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *_):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("node is up", file=sys.stderr, flush=True)
http.server.HTTPServer(("127.0.0.1", port), Admin).serve_forever()
"""
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)"


class Spoken:
    """A terminal that remembers, and acts on the first line that starts with a word."""

    def __init__(self) -> None:
        self.results: list[str] = []
        self.lines: list[str] = []
        self.on: dict[str, Callable[[], None]] = {}
        self.terminal = Terminal(self._result, self._line, lambda _: None)

    def _result(self, line: str) -> None:
        self.results.append(line)
        self._act(line)

    def _line(self, line: str) -> None:
        self.lines.append(line)
        self._act(line)

    def _act(self, line: str) -> None:
        for start in [start for start in self.on if line.startswith(start)]:
            self.on.pop(start)()


def free_base() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def settings() -> Settings:
    made = simulated_settings(2)
    nodes = [{"host": "127.0.0.1", "name": n, "node_id": i, "ports": [1001 + 5 * i]} for i, n in enumerate(("a", "b"))]
    nodes[0]["ports"] = [1001, 1002, 1003, 1004, free_base()]
    return load(None, manual={"cluster.nodes": nodes, "models": {"demo": {}}}).settings.model_copy(
        update={"log": made.log}
    )


def answer(state: str) -> str:
    stages = [{"node_id": 0, "start": 0, "end": 3}, {"node_id": 1, "start": 3, "end": 5}]
    pipeline = {"model": "demo", "state": state, "transport": "grpc", "transport_reason": "why", "stages": stages}
    nodes = [{"node_id": i, "name": name, "state": "alive"} for i, name in enumerate(("a", "b"))]
    return json.dumps({"nodes": nodes, "pipelines": [pipeline]})


def node(settings: Settings, state: str = "ready") -> list[str]:
    return [sys.executable, "-c", NODE, str(settings.cluster.nodes[0].ports[4]), answer(state)]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def interrupt(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_ready_then_a_signal_ends_everything(settings: Settings, number: signal.Signals) -> None:
    spoken = Spoken()
    spoken.on["ready "] = interrupt(number)
    code = await serve(settings, {"a": node(settings), "b": python("input()")}, spoken.terminal)
    assert code == 0
    assert spoken.results == ["ready http://127.0.0.1:8000/v1  model demo  a[0-3) b[3-5)  transport grpc (why)"]
    assert "a | node is up" in spoken.lines


async def test_a_signal_before_ready_ends_everything(settings: Settings) -> None:
    spoken = Spoken()
    spoken.on["a | node is up"] = interrupt()
    assert await serve(settings, {"a": node(settings, "loading")}, spoken.terminal) == 0
    assert spoken.results == []


async def test_a_node_that_dies_at_start_is_told_with_its_last_words(settings: Settings) -> None:
    spoken = Spoken()
    dying = python("import sys; print('first', file=sys.stderr); sys.exit('no such model')")
    with pytest.raises(Unavailable, match="b exited with code 1 before the cluster was ready: no such model"):
        await serve(settings, {"a": python("input()"), "b": dying}, spoken.terminal)
    assert {"b | first", "b | no such model"} <= set(spoken.lines)


async def test_the_others_go_on_when_a_node_dies_later(settings: Settings, tmp_path: Path) -> None:
    spoken = Spoken()
    signal_file = tmp_path / "die"
    os.mkfifo(signal_file)
    # The second node ends when somebody writes into its pipe, and that happens when the cluster is ready.
    spoken.on["ready "] = lambda: os.close(os.open(signal_file, os.O_WRONLY))
    spoken.on["b exited with code 4; a left"] = interrupt()
    dying = python(f"import sys; open({str(signal_file)!r}).read(); sys.exit(4)")
    assert await serve(settings, {"a": node(settings), "b": dying}, spoken.terminal) == 0
    assert "b exited with code 4; a left" in spoken.lines


async def test_no_node_left_is_a_failure(settings: Settings) -> None:
    spoken = Spoken()
    command = node(settings)
    command[2] = NODE.replace("serve_forever()", "handle_request()")
    assert await serve(settings, {"a": command}, spoken.terminal) == 1
    assert len(spoken.results) == 1
    assert "a exited with code 0; no node left" in spoken.lines


async def test_a_deaf_node_is_killed(settings: Settings) -> None:
    spoken = Spoken()
    spoken.on["b | deaf"] = interrupt()
    async with asyncio.timeout(30):
        assert await serve(settings, {"b": python(DEAF)}, spoken.terminal, stop_seconds=0.2) == 0


async def test_a_second_signal_kills_at_once(settings: Settings) -> None:
    spoken = Spoken()

    def twice() -> None:
        interrupt()()
        asyncio.get_running_loop().call_later(0.3, interrupt())

    spoken.on["b | deaf"] = twice
    async with asyncio.timeout(60):
        assert await serve(settings, {"b": python(DEAF)}, spoken.terminal, stop_seconds=300) == 0


# -- how long to wait ---------------------------------------------------------------------------------


def view(state: str, detail: str = "") -> ClusterView:
    return ClusterView("c", "a", (), (PipelineView("demo", state, detail),))


def test_a_pipeline_that_stays_failed_ends_the_wait() -> None:
    patience = _Patience(stall_seconds=100)
    patience.check(view("failed", "no memory"), 0)
    patience.check(view("loading"), 5)
    patience.check(view("failed", "no memory"), 6)
    patience.check(view("failed", "no memory"), 12)
    with pytest.raises(Unavailable, match="demo cannot be served: no memory"):
        patience.check(view("failed", "no memory"), 12.1)


def test_progress_keeps_the_wait_alive() -> None:
    patience = _Patience(stall_seconds=10)
    for second in range(0, 100, 9):
        patience.check(view("loading", f"{second}"), second)
    with pytest.raises(Unavailable, match="nothing has changed for 10 s"):
        patience.check(view("loading", "99"), 110)


def test_each_node_is_a_child(tmp_path: Path) -> None:
    commands = commands_of(simulated_settings(2), tmp_path)
    assert list(commands) == ["mini1", "mini2"]
    assert commands["mini2"][1:] == [
        "-m",
        "mlx_cluster",
        "node",
        "--config",
        str(tmp_path),
        "--id",
        "mini2",
        "--lifeline",
    ]


def test_mpi_is_one_mpirun(tmp_path: Path) -> None:
    made = simulated_settings(3)
    made = made.model_copy(update={"network": made.network.model_copy(update={"transport": "mpi"})})
    (command,) = commands_of(made, tmp_path).values()
    assert command[command.index("-n") + 1] == "3"
    assert command[-2:] == ["--config", str(tmp_path)]
