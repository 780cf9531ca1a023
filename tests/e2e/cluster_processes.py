"""A cluster of real ``mlx-cluster node`` processes on free ports, for end-to-end tests.

Owns: the settings, the processes and what a test asks of them. Every wait has a generous deadline and ends early.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

PATIENCE_SECONDS = 90.0
POLL_SECONDS = 0.1
T = TypeVar("T")


def free_block(count: int) -> int:
    """The first of ``count`` neighbouring ports that are free, away from what the system gives out by itself.

    Each of pytest's workers has a range of its own: ports are free until the cluster that got them has started.
    """
    worker, workers = (
        os.environ.get("PYTEST_XDIST_WORKER", "gw0"),
        int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")),
    )
    width = 10000 // workers
    low = 20000 + int(worker.removeprefix("gw")) * width
    begin = low + os.getpid() % 100 * (width // 100)
    for first in [*range(begin, low + width - count, count), *range(low, begin - count, count)]:
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                each = socket.socket()
                sockets.append(each)
                each.bind(("127.0.0.1", port))
        except OSError:
            continue
        else:
            return first
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports for a test cluster")


def within(what: str, probe: Callable[[], T | None], seconds: float = PATIENCE_SECONDS) -> T:
    """The first value of ``probe`` that is not None or False."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = probe()
        if value is not None and value is not False:
            return value
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False
    return state != "Z"


@dataclass(slots=True)
class ClusterProcesses:
    """Nodes mini1, mini2, … with one model. ``start`` starts all, ``admin`` asks one."""

    folder: Path
    model_dir: Path
    num_nodes: int = 3
    split: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    first_port: int = 0

    def __post_init__(self) -> None:
        self.first_port = free_block(6 * self.num_nodes + 1 + 20 + 1)
        nodes = [
            {"host": "127.0.0.1", "name": self.name(i), "node_id": i, "ports": [self._base(i) + k for k in range(5)]}
            for i in range(self.num_nodes)
        ]
        low = self.first_port + 6 * self.num_nodes + 1  # and one port more behind these 20, for a witness
        model: dict[str, Any] = {"path": str(self.model_dir)}
        if self.split:
            model["split"] = self.split
        tree: dict[str, Any] = {
            "cluster": {"name": f"test-{self.first_port}", "nodes": nodes},
            "coordinator": {"port": self.first_port + 6 * self.num_nodes},
            "api_gateway": {"port": self.first_port + 5 * self.num_nodes},
            "network": {"mlx_port_range": [low, low + 19]},
            "nodes": {self.name(i): {"state_dir": str(self.folder / f"state{i}")} for i in range(self.num_nodes)},
            "models": {"tiny": model},
        }
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(tree))
        self.amend(self.settings)

    def amend(self, settings: dict[str, dict[str, Any]]) -> None:
        """Set keys of some sections, before the nodes start."""
        path = self.folder / "cluster.yaml"
        tree = yaml.safe_load(path.read_text())
        for section, values in settings.items():
            tree[section] = {**tree.get(section, {}), **values}
        path.write_text(yaml.safe_dump(tree))

    def name(self, node: int) -> str:
        return f"mini{node + 1}"

    def _base(self, node: int) -> int:
        return self.first_port + 5 * node

    # -- processes -------------------------------------------------------------------------------------------

    def start(self, *nodes: int) -> None:
        for node in nodes or range(self.num_nodes):
            output = (self.folder / f"node{node}.log").open("ab")
            self.processes[node] = subprocess.Popen(
                [sys.executable, "-m", "mlx_cluster", "node", "--config", str(self.folder), "--id", str(node)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            output.close()

    def kill(self, node: int) -> None:
        """kill -9."""
        process = self.processes.pop(node)
        process.kill()
        process.wait(20)

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)

    def logs(self) -> str:
        return "\n".join(
            f"---- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in self.folder.glob("*.log")
        )

    # -- questions -------------------------------------------------------------------------------------------

    def gateway(self, node: int) -> str:
        return f"http://127.0.0.1:{self.first_port + 5 * self.num_nodes + node}"

    def admin(self, path: str = "/cluster", node: int = 0, offset: int = 4) -> dict[str, Any] | None:
        """The answer of a node's admin port (or another one by its offset), None while it does not answer."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self._base(node) + offset}{path}", timeout=5.0, trust_env=False)
        except httpx.HTTPError:
            return None
        return dict(answer.json())

    def pipeline(self, node: int = 0) -> dict[str, Any] | None:
        view = self.admin(node=node)
        return view["pipelines"][0] if view and view["pipelines"] else None

    def ready(self, node: int = 0) -> dict[str, Any] | None:
        """The pipeline as ``node`` sees it, once it is ready."""
        ended = self.processes[node].poll() if node in self.processes else None
        assert ended is None, f"node {node} ended with {ended}"
        pipeline = self.pipeline(node)
        return pipeline if pipeline and pipeline["state"] == "ready" else None

    def wait_ready(self, *nodes: int) -> dict[str, Any]:
        """Wait until these nodes (default: all that run) say ready; the picture of the first of them."""
        found = [within(f"node {n}: ready", lambda n=n: self.ready(n)) for n in nodes or sorted(self.processes)]
        return found[0]

    def complete(self, node: int, *, max_tokens: int = 8, timeout: float = PATIENCE_SECONDS) -> httpx.Response:
        """A greedy completion through this node's gateway."""
        body = {"model": "tiny", "prompt": "hello", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return httpx.post(f"{self.gateway(node)}/v1/completions", json=body, timeout=timeout, trust_env=False)


@contextlib.contextmanager
def running(cluster: ClusterProcesses) -> Iterator[ClusterProcesses]:
    """Start all nodes and stop them afterwards; a failing test shows their logs."""
    try:
        cluster.start()
        yield cluster
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        cluster.stop()
