"""Children end with their parent: real processes, because only the kernel can say whether it works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from mlx_cluster import lifeline

PATIENCE_SECONDS = 30.0

ECHO = "import sys; [print('heard', line.strip(), flush=True) for line in sys.stdin]"
SLEEP = "import time; time.sleep(600)"


async def ended(pid: int) -> None:
    """Wait until no process has this id (a zombie that nobody collects counts as ended)."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while alive(pid):  # the kernel tells nobody but the parent
            await asyncio.sleep(0.02)


async def stopped(pid: int) -> None:
    """Wait until the kernel has stopped this process."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            ps = await asyncio.create_subprocess_exec("ps", "-o", "stat=", "-p", str(pid), stdout=subprocess.PIPE)
            if (await ps.communicate())[0].startswith(b"T"):
                return


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return True


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_lines_go_both_ways_and_the_end_of_stdin_ends_the_child() -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    child = await lifeline.spawn(python(ECHO), on_line=heard.put_nowait)
    assert child.send_line("one")
    assert await asyncio.wait_for(heard.get(), PATIENCE_SECONDS) == "heard one"
    exit_ = await child.stop(PATIENCE_SECONDS)
    assert exit_.code == -signal.SIGTERM
    assert not child.send_line("two")


async def test_an_exit_carries_the_last_words() -> None:
    child = await lifeline.spawn(python("import sys; sys.exit('no such model')"), stderr="tail")
    exit_ = await asyncio.wait_for(child.wait(), PATIENCE_SECONDS)
    assert exit_.code == 1
    assert str(exit_) == "exited with code 1; its last words: no such model"


async def test_the_tail_of_standard_error_is_bounded_and_every_line_is_handed_on() -> None:
    lines: list[str] = []
    code = "import sys; [print(i, file=sys.stderr) for i in range(1000)]"
    child = await lifeline.spawn(python(code), stderr="tail", on_error_line=lines.append)
    exit_ = await asyncio.wait_for(child.wait(), PATIENCE_SECONDS)
    assert lines == [str(i) for i in range(1000)]
    assert exit_.stderr_tail.splitlines() == lines[-40:]


async def test_a_handler_that_raises_does_not_stop_the_reading() -> None:
    lines: list[str] = []

    def handle(line: str) -> None:
        lines.append(line)
        if line == "1":
            raise ValueError(line)

    child = await lifeline.spawn(python("print(1); print(2)"), on_line=handle)
    await asyncio.wait_for(child.wait(), PATIENCE_SECONDS)
    assert lines == ["1", "2"]


async def test_stop_kills_a_child_that_does_not_listen() -> None:
    ready = asyncio.Event()
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"
    child = await lifeline.spawn(python(code), on_line=lambda _: ready.set())
    await asyncio.wait_for(ready.wait(), PATIENCE_SECONDS)
    exit_ = await child.stop(0.1)
    assert exit_.code == -signal.SIGKILL
    assert "SIGKILL (out of memory?)" in str(exit_)


async def test_stop_kills_a_stopped_child() -> None:
    child = await lifeline.spawn(python(SLEEP))
    os.kill(child.pid, signal.SIGSTOP)
    await stopped(child.pid)  # until then a SIGTERM would overtake it
    assert (await child.stop(0.1)).code == -signal.SIGKILL


async def test_a_program_that_does_not_exist_is_an_os_error() -> None:
    with pytest.raises(OSError, match="no-such-program"):
        await lifeline.spawn(["/no-such-program"])


async def test_children_are_spawned_from_the_main_thread_only() -> None:
    def elsewhere() -> None:
        asyncio.run(lifeline.spawn(python(SLEEP)))

    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(elsewhere)


def test_what_names_an_mlx_group_does_not_reach_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_HOSTFILE", "hosts.json")
    monkeypatch.setenv("MLX_MPI_LIBNAME", "libmpi.so.40")
    env = lifeline.child_environment({"OMP_NUM_THREADS": "1"})
    assert not {"MLX_RANK", "MLX_HOSTFILE"} & set(env)
    assert env["MLX_MPI_LIBNAME"] == "libmpi.so.40"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("code", "text"),
    [(3, "exited with code 3"), (-signal.SIGALRM, "heard nothing from its parent"), (-99, "killed by signal 99")],
)
def test_an_exit_code_in_words(code: int, text: str) -> None:
    assert text in lifeline.describe_code(code)


# -- parents that die or freeze --------------------------------------------------------------------

CHILD = """
import os, threading, time
from mlx_cluster import lifeline
heard = threading.Event()
def on_line(line):
    lifeline.arm(float(line))
    heard.set()
lifeline.watch_parent(lambda: os._exit(5), on_line=on_line, death_signal={death_signal})
heard.wait()
print(os.getpid(), flush=True)
{work}
"""
PARENT = """
import asyncio, sys
from mlx_cluster import lifeline

async def main():
    siblings = []
    for code in sys.argv[1:]:
        siblings.append(await lifeline.spawn([sys.executable, "-c", code], on_line=lambda l: print(l, flush=True)))
    while True:
        for child in siblings:
            child.send_line("{arm_seconds}")
        await asyncio.sleep(0.1)

asyncio.run(main())
"""


async def family(*children: str, arm_seconds: float = 60.0) -> tuple[asyncio.subprocess.Process, list[int]]:
    """A parent of its own with these children; gives it and the children's ids once all of them run."""
    code = PARENT.format(arm_seconds=arm_seconds)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *children, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    assert parent.stdout is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        return parent, [int(await parent.stdout.readline()) for _ in children]


@pytest.mark.parametrize("death_signal", ["None", "__import__('signal').SIGKILL"])
async def test_no_child_outlives_a_killed_parent(death_signal: str) -> None:
    # Two siblings: neither may hold the other's lifeline open.
    code = CHILD.format(death_signal=death_signal, work=SLEEP)
    parent, pids = await family(code, code)
    parent.kill()
    await parent.wait()
    for pid in pids:
        await ended(pid)


async def test_a_child_of_a_frozen_parent_dies_by_its_timer_even_while_native_code_holds_the_gil() -> None:
    # PyDLL keeps the GIL during the call: no Python thread of the child can run any more.
    stuck = "import ctypes; ctypes.PyDLL(None).sleep(600)"
    parent, pids = await family(
        CHILD.format(death_signal="None", work=SLEEP),
        CHILD.format(death_signal="None", work=stuck),
        arm_seconds=2.5,
    )
    parent.send_signal(signal.SIGSTOP)
    try:
        for pid in pids:
            await ended(pid)
    finally:
        parent.kill()
        await parent.wait()
