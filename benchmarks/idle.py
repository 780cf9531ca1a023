"""What an idle cluster costs: CPU time of every process of `mlx-cluster up` while nobody asks anything. Linux only.

    python benchmarks/idle.py --seconds 20 --json idle.json

A cluster with the demo model comes up, answers one request, and is left alone; after --settle seconds the CPU time of
each of its processes is read from /proc, and again --seconds later. The aim is below 2 % of a core for each. CPU time
hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record

PATIENCE_SECONDS = 180.0
AIM_PERCENT = 2.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    what: str
    pid: int
    cpu_percent: float
    wakeups_per_second: float  # voluntary context switches of all its threads


def family(pid: int) -> dict[int, str]:
    """The processes below this one, and what they are."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (OSError, ValueError, IndexError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(folder.name))
        names[int(folder.name)] = command
    found: dict[int, str] = {}
    wanted = [pid]
    while wanted:
        each = wanted.pop()
        found[each] = _what(names.get(each, ""))
        wanted += children.get(each, [])
    return found


def _what(command: str) -> str:
    if "mlx_cluster.stage" in command:
        return "stage process"
    if " node " in command:
        return "agent " + command.rpartition("--id ")[2].partition(" ")[0]
    return "up" if " up" in command else command[:40]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def wakeups(pid: int) -> dict[str, int]:
    """Voluntary context switches by thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            for line in task.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    found[task.parent.name] = int(line.split()[1])
    return found


def measure(pids: dict[int, str], seconds: float) -> list[Usage]:
    before = {pid: (cpu_seconds(pid), wakeups(pid)) for pid in pids}
    begin = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - begin
    usages = []
    for pid, what in pids.items():
        cpu, woken = before[pid]
        usages.append(
            Usage(
                what,
                pid,
                round(100 * (cpu_seconds(pid) - cpu) / elapsed, 2),
                round(sum(now - woken[thread] for thread, now in wakeups(pid).items() if thread in woken) / elapsed, 1),
            )
        )
    return usages


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody holds now."""
    for first in range(31000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as each:
                    each.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise SystemExit("no free ports for the cluster")


def wait_for_answer(url: str, model: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    body = {"model": model, "prompt": "hello", "max_tokens": 4}
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the cluster ended with {process.returncode}")
        try:
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the cluster did not answer within {PATIENCE_SECONDS:g} s")


def run(nodes: int, settle: float, seconds: float) -> list[Usage]:
    first = free_ports(100 * nodes + nodes + 1)
    command = [
        *(sys.executable, "-m", "mlx_cluster", "up", "--model", "demo", "--nodes", str(nodes)),
        *("--base-port", str(first), "--gateway-port", str(first + 100 * nodes)),
        *("--set", f"coordinator.port={first + 100 * nodes + nodes}"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_answer(f"http://127.0.0.1:{first + 100 * nodes}", "demo", process)
        time.sleep(settle)
        return measure(family(process.pid), seconds)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--settle", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    usages = run(options.nodes, options.settle, options.seconds)
    print(f"{'process':<16}{'pid':>8}{'CPU %':>8}{'wake-ups/s':>12}")
    for usage in usages:
        print(f"{usage.what:<16}{usage.pid:>8}{usage.cpu_percent:>8.2f}{usage.wakeups_per_second:>12.1f}")
    worst = max(usages, key=lambda usage: usage.cpu_percent)
    verdict = "met" if worst.cpu_percent < AIM_PERCENT else "missed"
    print(f"the aim of {AIM_PERCENT:g} % is {verdict}: at most {worst.cpu_percent:.2f} % ({worst.what})")
    results: dict[str, Any] = {"processes": [asdict(usage) for usage in usages]}
    record.save(options.json, "idle", results)


if __name__ == "__main__":
    main()
