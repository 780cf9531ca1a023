"""The test's side of ``links_child``: a line of stages in real processes, asked over sockets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ANSWER_SECONDS = 60.0  # a slow machine's patience; no assertion depends on it


class Refused(Exception):
    """The stage answered with a typed error; ``code`` is its code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Stage:
    """One stage of the line. ``begin`` a command and ask for its ``result`` later, or ``ask`` for both."""

    def __init__(self, control: socket.socket) -> None:
        control.settimeout(ANSWER_SECONDS)
        self._control = control
        self._lines = control.makefile("r")
        hello = json.loads(self._lines.readline())
        self.index, self.address, self.pid = hello["index"], hello["address"], hello["pid"]
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}

    def begin(self, do: str, **arguments: Any) -> int:
        self._number += 1
        self._control.sendall(json.dumps({"number": self._number, "do": do, **arguments}).encode() + b"\n")
        return self._number

    def result(self, number: int) -> Any:
        """Raises ``Refused`` for a typed error and ``EOFError`` when the process is gone."""
        while number not in self._answers:
            line = self._lines.readline()
            if not line:
                raise EOFError(f"stage {self.index} is gone")
            answer = json.loads(line)
            self._answers[answer["number"]] = answer
        answer = self._answers.pop(number)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["result"]

    def ask(self, do: str, **arguments: Any) -> Any:
        return self.result(self.begin(do, **arguments))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def hang_up(self) -> None:
        """The process ends by itself when its control connection does."""
        self._lines.close()
        self._control.close()


class Line:
    """The stages of a pipeline, by index."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]

    def begin_open(self, plan_hashes: list[str] | None = None, epochs: list[str] | None = None) -> list[int]:
        addresses = [stage.address for stage in self.stages]
        mlx_addresses = [f"127.0.0.1:{port}" for port in free_ports(len(self.stages))]
        return [
            stage.begin(
                "open",
                stage_addresses=addresses,
                mlx_addresses=mlx_addresses,
                plan_hash=plan_hashes[stage.index] if plan_hashes else "plan",
                epoch=epochs[stage.index] if epochs else "1.0",
                timeout=30.0,
            )
            for stage in self.stages
        ]

    def open(self) -> None:
        for stage, number in zip(self.stages, self.begin_open(), strict=True):
            stage.result(number)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def mpirun() -> str | None:
    """The mpirun beside this interpreter (the ``openmpi`` package puts it there), or the system's."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


@contextmanager
def line_of(kind: str, num_stages: int) -> Iterator[Line]:
    """Start the processes of a line, not yet linked; they are gone when the block ends."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(ANSWER_SECONDS)
        port = listener.getsockname()[1]
        for command in _commands(kind, num_stages, port):
            stack.enter_context(_process(command))
        stages = []
        for _ in range(num_stages):
            stage = Stage(listener.accept()[0])
            stack.callback(stage.hang_up)
            stages.append(stage)
        yield Line(sorted(stages, key=lambda stage: stage.index))


def _commands(kind: str, num_stages: int, port: int) -> list[list[str]]:
    child = [sys.executable, "-m", "tests.contract.links_child", kind, str(num_stages), str(port)]
    if kind == "inprocess":
        return [child]
    if kind == "mpi":
        launcher = mpirun()
        assert launcher is not None
        return [[launcher, "--oversubscribe", "--bind-to", "none", "-np", str(num_stages), *child]]
    return [[*child, str(index)] for index in range(num_stages)]


@contextmanager
def _process(command: list[str]) -> Iterator[None]:
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM lets mpirun take its ranks along; a stage that is stopped or spins needs SIGKILL."""
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
