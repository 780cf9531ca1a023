"""How nodes are started under mpirun on this machine.

Owns: finding mpirun (the system's, or that of the ``openmpi`` package of this Python) and its command line.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_cluster.errors import LinkUnavailable


def find_mpirun() -> str | None:
    """The first of: on the PATH, beside this interpreter."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    return shutil.which("mpirun") or (str(beside) if beside.is_file() else None)


def mpirun_command(num_ranks: int, command: Sequence[str]) -> list[str]:
    """mpirun with ``num_ranks`` ranks of ``command``. Raises ``LinkUnavailable`` when there is no mpirun.

    Ranks are node agents, which mostly wait: they are neither bound to a core nor counted against the slots.
    """
    mpirun = find_mpirun()
    if mpirun is None:
        raise LinkUnavailable(
            "mpirun is not on this machine: install Open MPI (pip install 'mlx-cluster[mpi]') or take another transport"
        )
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [mpirun, "-n", str(num_ranks), *root, "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", *command]
