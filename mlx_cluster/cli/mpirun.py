"""Nodes as ranks of one mpirun on this machine.

Owns: finding mpirun (the system's, or that of the ``openmpi`` package of this Python), its command line, and a guard
process around it. mpirun does not end when its standard input does, so the guard holds the lifeline for it.

Run as ``python -m mlx_cluster.cli.mpirun COMMAND...``: runs the command, ends it when the launcher is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from mlx_cluster import lifeline
from mlx_cluster.errors import LinkUnavailable

# From SIGTERM to SIGKILL of mpirun, which itself gives its ranks a second.
GRACE_SECONDS = 3.0


def find_mpirun() -> str | None:
    """The first of: on the PATH, beside this interpreter."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    return shutil.which("mpirun") or (str(beside) if beside.is_file() else None)


def guarded_mpirun(num_ranks: int, command: Sequence[str]) -> list[str]:
    """``num_ranks`` ranks of ``command``, under the guard. Raises ``LinkUnavailable`` when there is no mpirun.

    Ranks are node agents, which mostly wait: they are neither bound to a core nor counted against the slots.
    """
    mpirun = find_mpirun()
    if mpirun is None:
        raise LinkUnavailable(
            "mpirun is not on this machine: install Open MPI (pip install 'mlx-cluster[mpi]') or take another transport"
        )
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    options = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return [
        *(sys.executable, "-m", "mlx_cluster.cli.mpirun"),
        *(mpirun, "-n", str(num_ranks)),
        *root,
        *options,
        *command,
    ]


def guard(command: Sequence[str]) -> int:
    """Run ``command`` until it ends, or until SIGTERM, SIGINT or the end of standard input; its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    killer = threading.Timer(GRACE_SECONDS, process.kill)
    killer.daemon = True

    def end(_number: int, _frame: object) -> None:
        process.terminate()
        if not killer.is_alive() and process.poll() is None:
            killer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    lifeline.watch_parent(lambda: os.kill(os.getpid(), signal.SIGTERM), death_signal=None)
    code = process.wait()
    killer.cancel()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
