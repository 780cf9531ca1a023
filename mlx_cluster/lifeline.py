"""Child processes that never outlive the process that started them.

Owns: spawning with a lifeline (a pipe on the child's stdin that stays open as long as the parent lives), stopping and
describing an exit; in the child: noticing that the parent is gone (end of file, and on Linux the parent-death signal)
and the kernel timer that ends a child whose parent is frozen.
Does not own: what is said over the pipes.
Invariant: whatever happens to the parent (exit, SIGKILL, SIGSTOP), its children end by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_cluster import log

logger = log.get("lifeline")

LineHandler = Callable[[str], None]

_MAX_LINE_BYTES = 1 << 20
_TAIL_LINES = 40
_MAX_UNREAD_BYTES = 64 * 1024  # what a child may leave unread on its stdin before further lines to it are dropped
_PR_SET_PDEATHSIG = 1

# A child joins an mlx group only when it is told to in words; what its parent was started with must not leak into it.
# FAST_SYNCH is in the list because it can wedge a Mac's GPU until the next boot.
_SCRUBBED = (
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_WORLD_SIZE",
    "MLX_RING_VERBOSE",
    "MLX_IBV_DEVICES",
    "MLX_IBV_COORDINATOR",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
    "NCCL_HOST_IP",
    "NCCL_PORT",
    "MLX_METAL_FAST_SYNCH",
)


# -- the parent's side ----------------------------------------------------------------------------


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what names an mlx group, plus ``extra``."""
    kept = {name: value for name, value in os.environ.items() if name not in _SCRUBBED}
    return {**kept, **(extra or {})}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended: ``code`` is its exit code, or the negative number of the signal that killed it."""

    code: int
    stderr_tail: str = ""

    def __str__(self) -> str:
        text = describe_code(self.code)
        return f"{text}; its last words: {self.stderr_tail}" if self.stderr_tail else text


def describe_code(code: int) -> str:
    """``-9`` → ``killed by SIGKILL (out of memory?)``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"killed by signal {-code}"
    hint = {
        signal.SIGKILL: " (out of memory?)",
        signal.SIGALRM: " (it heard nothing from its parent for too long)",
        signal.SIGSEGV: " (a crash in native code)",
        signal.SIGABRT: " (a crash in native code)",
    }.get(number, "")
    return f"killed by {number.name}{hint}"


class Child:
    """A running child process. Made by ``spawn``."""

    def __init__(self, transport: asyncio.SubprocessTransport, pipes: _Pipes):
        self._transport = transport
        self._pipes = pipes

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._transport.get_returncode()

    @property
    def stderr_tail(self) -> str:
        """The last lines it wrote to standard error; empty when that is inherited."""
        return "\n".join(self._pipes.tail)

    def send_line(self, line: str) -> bool:
        """Write one line to its stdin, without waiting; False when it is gone or no longer reads."""
        stdin = self._transport.get_pipe_transport(0)
        if not isinstance(stdin, asyncio.WriteTransport) or stdin.is_closing() or self.returncode is not None:
            return False
        if stdin.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            return False
        stdin.write(line.encode() + b"\n")
        return True

    async def wait(self) -> Exit:
        """Wait, without a deadline of its own, until it has ended and its last lines are read."""
        await self._pipes.exited.wait()
        try:
            # A grandchild that inherited a pipe may hold it open: the last words are worth a second, not more.
            async with asyncio.timeout(1.0):
                await self._pipes.drained.wait()
        except TimeoutError:
            pass
        code = self.returncode
        self._transport.close()
        assert code is not None
        return Exit(code, self.stderr_tail)

    async def stop(self, grace_seconds: float, number: signal.Signals = signal.SIGTERM) -> Exit:
        """The signal, then SIGKILL after ``grace_seconds``. A cancelled ``stop`` kills at once."""
        self._signal(number)
        try:
            async with asyncio.timeout(grace_seconds):
                await self._pipes.exited.wait()
        except TimeoutError:
            self.kill()
        except asyncio.CancelledError:
            self.kill()
            raise
        return await self.wait()

    def kill(self) -> None:
        """SIGKILL, at once: also ends a stopped process and one that is stuck in native code."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._transport.send_signal(number)


async def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    on_line: LineHandler | None = None,
    on_error_line: LineHandler | None = None,
    stderr: Literal["inherit", "tail"] = "inherit",
    cwd: str | None = None,
) -> Child:
    """Start ``argv`` with a lifeline on its stdin; ``env`` is added to ``child_environment()``.

    ``on_line`` gets each line of its stdout (inherited when None); with ``stderr="tail"`` its last lines are kept for
    ``Exit`` and each is handed to ``on_error_line``. Raises ``OSError`` when it cannot be started.
    The pipes are close-on-exec, so no sibling holds this child's lifeline open after the parent is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        # Linux sends the parent-death signal when the spawning *thread* ends.
        raise RuntimeError("children are spawned from the main thread only")
    readable = {fd for fd, wanted in ((1, on_line is not None), (2, stderr == "tail")) if wanted}
    pipes = _Pipes(readable, on_line, on_error_line)
    transport, _ = await asyncio.get_running_loop().subprocess_exec(
        lambda: pipes,
        *argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if 1 in readable else None,
        stderr=subprocess.PIPE if 2 in readable else None,
        env=child_environment(env),
        cwd=cwd,
        close_fds=True,
    )
    return Child(transport, pipes)


class _Pipes(asyncio.SubprocessProtocol):
    """Cuts what a child says into lines, keeps the tail of its standard error and notes its end."""

    def __init__(self, readable: set[int], on_line: LineHandler | None, on_error_line: LineHandler | None) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.exited = asyncio.Event()
        self.drained = asyncio.Event()
        self._open = readable
        self._handlers = {1: on_line, 2: on_error_line}
        self._rest = {1: b"", 2: b""}
        if not readable:
            self.drained.set()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._rest[fd] + data).split(b"\n")
        for line in lines:
            self._line(fd, line)
        # A line without an end must not grow for ever: what is too long is handed on in pieces.
        if len(rest) > _MAX_LINE_BYTES:
            self._line(fd, rest)
            rest = b""
        self._rest[fd] = rest

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd not in self._open:
            return
        if self._rest[fd]:
            self._line(fd, self._rest[fd])
        self._open.discard(fd)
        if not self._open:
            self.drained.set()

    def process_exited(self) -> None:
        self.exited.set()

    def _line(self, fd: int, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        if fd == 2:
            self.tail.append(text)
        handler = self._handlers[fd]
        if handler is None:
            return
        try:
            handler(text)
        except Exception:  # the root of the pipe: one bad line must not stop the reading of the next
            logger.exception("a line of a child could not be handled", descriptor=fd)


# -- the child's side -----------------------------------------------------------------------------


def watch_parent(
    on_lost: Callable[[], None],
    *,
    on_line: LineHandler | None = None,
    death_signal: signal.Signals | None = signal.SIGKILL,
) -> threading.Thread:
    """Call ``on_lost`` (from a thread of its own) when the parent is gone; hand ``on_line`` what it says until then.

    On Linux the kernel also sends ``death_signal`` when the parent dies, which works while native code holds the GIL;
    None leaves that out, for a child that wants to end in good order. Call it from the main thread.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # an ignored signal stays ignored across exec; ``arm`` needs it
    if death_signal is not None:
        _die_with_parent(death_signal)
    thread = threading.Thread(target=_read_stdin, args=(on_lost, on_line), name="lifeline", daemon=True)
    thread.start()
    return thread


def arm(seconds: float) -> None:
    """End this process by a kernel timer unless ``arm`` is called again within ``seconds``; 0 switches it off.

    The default action of SIGALRM needs no Python, so it ends a process that is stuck in native code with the GIL held.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _die_with_parent(number: signal.Signals) -> None:
    if not sys.platform.startswith("linux"):
        return
    # A parent that died before this call is seen as end of file on stdin.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")


def _read_stdin(on_lost: Callable[[], None], on_line: LineHandler | None) -> None:
    # os.read, not sys.stdin: a daemon thread inside a buffered reader holds its lock while the interpreter shuts down.
    rest = b""
    while chunk := _read_some():
        if on_line is None:
            continue
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            on_line(line.decode(errors="replace"))
    on_lost()


def _read_some() -> bytes:
    try:
        return os.read(0, 64 * 1024)
    except OSError:  # a terminal that went away, or a closed descriptor: nobody is there any more
        return b""
