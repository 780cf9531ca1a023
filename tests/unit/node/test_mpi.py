"""Nodes as ranks of mpirun: ids, hosts and the exchange itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_cluster.cli.mpirun import find_mpirun
from mlx_cluster.errors import ConfigError
from mlx_cluster.node.mpi import World, nodes_of, settings_of_rank

ROOT = Path(__file__).resolve().parents[3]


def test_hosts_become_nodes() -> None:
    assert nodes_of(["mini1", "mini2"]) == [{"host": "mini1", "node_id": 0}, {"host": "mini2", "node_id": 1}]
    assert nodes_of(["a", "a", "b"]) == [
        {"host": "a", "node_id": 0, "name": "node_0"},
        {"host": "a", "node_id": 1, "name": "node_1"},
        {"host": "b", "node_id": 2},
    ]
    assert {node["host"] for node in nodes_of(["box", "box"])} == {"127.0.0.1"}


@pytest.mark.parametrize("names", [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")])
def test_a_rank_is_a_node_of_the_configuration(names: tuple[str, str]) -> None:
    loaded, name = settings_of_rank(ROOT / "config", {names[0]: "2", names[1]: "3"}, never)
    assert name == "master"
    assert loaded.settings.network.transport == "mpi"
    with pytest.raises(ConfigError, match="run it with -n 3"):
        settings_of_rank(ROOT / "config", {names[0]: "0", names[1]: "1"}, never)


def test_a_rank_that_the_environment_does_not_tell_is_asked_of_mpi() -> None:
    assert settings_of_rank(ROOT / "config", {}, lambda: World(1, ("x", "y", "z")))[1] == "mini2"


def test_without_nodes_the_ranks_are_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("models: {demo: {}}\n")
    environ = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    loaded, name = settings_of_rank(tmp_path, environ, lambda: World(1, ("a.lan", "b.lan")))
    assert name == "b"
    assert [entry.host for entry in loaded.settings.cluster.nodes] == ["a.lan", "b.lan"]


def never() -> World:
    raise AssertionError("nothing has to be asked of MPI")


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun on this machine")
def test_ranks_meet() -> None:
    mpirun = find_mpirun()
    assert mpirun is not None
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    code = "from mlx_cluster.node.mpi import exchange; w = exchange(); print('rank', w.rank, len(w.hosts))"
    command = [mpirun, "-n", "2", *root, "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 2", "rank 1 2"]
