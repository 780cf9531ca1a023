"""A node per rank of one ``mpirun``: node ids are ranks, peers' addresses come from MPI itself.

Owns: the exchange of addresses over MPI and the settings that follow. Does not own: the node (``node.main``), nor the
mpi link, whose stage processes join MPI as children of these agents, with their agent's rank.
Invariant: the agent itself never calls MPI_Init. A rank can be initialised by one process at a time, and that must be
its stage process; so the exchange runs in a short-lived child, and only where cluster.yaml names no nodes: two
processes of one rank in quick succession confuse Open MPI's peers ("server accept cannot find guid", then a hang).

Run it as ``mpirun -n 3 python -m mlx_cluster.node.mpi --config DIR``. This is the only file that imports mpi4py.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cluster.config.load import Loaded, load
from mlx_cluster.config.names import node_name
from mlx_cluster.errors import ClusterError, ConfigError, LinkUnavailable

EXCHANGE_SECONDS = 60.0  # all ranks must have been started by then


@dataclass(frozen=True, slots=True)
class World:
    """What the ranks know of each other: this rank, and every rank's host name."""

    rank: int
    hosts: tuple[str, ...]


def rank_and_size(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """What mpirun tells its children in their environment; None when it is not known how this one tells it."""
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if environ.get(rank, "").isdigit() and environ.get(size, "").isdigit():
            return int(environ[rank]), int(environ[size])
    return None


def exchange() -> World:
    """Ask MPI, in a child process, for the rank and everybody's host. Raises ``LinkUnavailable``."""
    command = [sys.executable, "-m", "mlx_cluster.node.mpi", "--exchange"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=EXCHANGE_SECONDS, check=True
        )
        data: dict[str, Any] = json.loads(answer.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired as error:
        raise LinkUnavailable(
            f"the ranks did not meet within {EXCHANGE_SECONDS:g} s: was every host reached?"
        ) from error
    except subprocess.CalledProcessError as error:
        raise LinkUnavailable(f"MPI cannot be used: {error.stderr.strip().rpartition(chr(10))[2]}") from error
    except (OSError, ValueError) as error:
        raise LinkUnavailable(f"MPI cannot be used: {error}") from error
    return World(data["rank"], tuple(data["hosts"]))


def _tell_world() -> None:
    """The child's part: one line of JSON."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    print(json.dumps({"rank": world.Get_rank(), "hosts": world.allgather(socket.gethostname())}), flush=True)


def settings_of_rank(
    config_dir: Path | None, environ: Mapping[str, str], meet: Callable[[], World] = exchange
) -> tuple[Loaded, str]:
    """The settings of this rank and its node's name.

    Rank r is the r-th node of cluster.yaml by id; without nodes there, the ranks ``meet`` and their hosts become the
    nodes. Raises ``ConfigError`` when the numbers differ.
    """
    manual: dict[str, Any] = {"network.transport": "mpi"}
    loaded = load(config_dir, environ=environ, manual=manual)
    known = rank_and_size(environ) if loaded.settings.cluster.nodes else None
    if known is None:
        world = meet()
        known = world.rank, len(world.hosts)
        if not loaded.settings.cluster.nodes:
            loaded = load(config_dir, environ=environ, manual={**manual, "cluster.nodes": nodes_of(world.hosts)})
    rank, size = known
    entries = sorted(loaded.settings.cluster.nodes, key=lambda entry: entry.node_id)
    if len(entries) != size:
        raise ConfigError(
            f"mpirun started {size} ranks, cluster.nodes has {len(entries)}: run it with -n {len(entries)}",
            key="cluster.nodes",
        )
    return loaded, node_name(entries[rank])


def nodes_of(hosts: Sequence[str]) -> list[dict[str, Any]]:
    """``cluster.nodes`` for these ranks: all on this machine stay on loopback; a host with two ranks numbers them."""
    here = len(set(hosts)) == 1
    times = Counter(hosts)
    nodes: list[dict[str, Any]] = []
    for rank, host in enumerate(hosts):
        node: dict[str, Any] = {"host": "127.0.0.1" if here else host, "node_id": rank}
        if times[host] > 1:
            node["name"] = f"node_{rank}"
        nodes.append(node)
    return nodes


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of every rank; an exit code."""
    parser = argparse.ArgumentParser(prog="mlx_cluster.node.mpi", description="Run a node as a rank of mpirun.")
    parser.add_argument("--config", type=Path, help="directory that holds cluster.yaml")
    parser.add_argument("--exchange", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.exchange:
        _tell_world()
        return 0
    try:
        loaded, name = settings_of_rank(options.config, os.environ)
        from mlx_cluster.node.main import run_node

        return run_node(loaded, name)
    except ClusterError as error:
        print(f"mlx-cluster: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
