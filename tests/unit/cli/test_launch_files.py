"""The files in launch/ fit the programs they are for, and the example configuration."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import plistlib
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from mlx_cluster.config.load import load

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def node_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_node", LAUNCH / "node.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_host_file_names_the_nodes_as_mlx_launch_wants_them() -> None:
    data = json.loads((LAUNCH / "hosts.json").read_text())
    nodes = load(ROOT / "config").settings.cluster.nodes
    assert [host["ssh"] for host in data["hosts"]] == [node.host for node in nodes]
    assert data["backend"] == "ring"
    # The ring takes IPv4 literals only.
    addresses = [ipaddress.IPv4Address(ip) for host in data["hosts"] for ip in host["ips"]]
    assert len(set(addresses)) == len(nodes)


def test_the_rank_is_taken_and_hidden_from_children(node_script: ModuleType) -> None:
    environ = {"MLX_RANK": "2", "MLX_HOSTFILE": "/tmp/x", "MLX_IBV_DEVICES": "/tmp/y", "PATH": "/bin"}
    assert node_script.take_rank(environ) == 2
    assert environ == {"MLX_IBV_DEVICES": "/tmp/y", "PATH": "/bin"}
    with pytest.raises(SystemExit, match="MLX_RANK is not set"):
        node_script.take_rank({})


def test_ranks_are_nodes_in_order_of_ids(node_script: ModuleType) -> None:
    assert [node_script.node_of_rank([5, 0, 3], rank) for rank in range(3)] == [0, 3, 5]
    with pytest.raises(SystemExit, match=r"rank 3, but cluster\.nodes has 3 nodes"):
        node_script.node_of_rank([5, 0, 3], 3)


@pytest.mark.parametrize("name", ["node.py", "mpi_node.py", "start-over-ssh.sh"])
def test_scripts_can_be_executed(name: str) -> None:
    assert os.access(LAUNCH / name, os.X_OK)


def test_the_launchd_file_runs_a_node() -> None:
    with (LAUNCH / "io.mlx-cluster.node.plist").open("rb") as file:
        job = plistlib.load(file)
    assert job["ProgramArguments"][1:3] == ["node", "--config"]
    assert job["Label"] == "io.mlx-cluster.node"


def test_the_systemd_unit_leaves_stages_to_their_agent() -> None:
    unit = (LAUNCH / "mlx-cluster-node.service").read_text()
    assert "KillMode=mixed" in unit
    assert "mlx-cluster node --config" in unit


def test_the_ssh_script_sends_what_a_shell_understands(tmp_path: Path) -> None:
    """A stand-in for ssh runs the command here, in a home of its own, with a stand-in for mlx-cluster."""
    stand_ins = {
        "ssh": (
            "#!/bin/bash\n"
            'while [ "${1:0:1}" = - ]; do shift 2; done\n'
            'echo "to $1"\n'
            'HOME=$PWD SHELL=/bin/sh sh -c "$2"\n'
        ),
        "mlx-cluster": '#!/bin/bash\necho "$@" >"$PWD/arguments"\nexec sleep 60\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MLX_CLUSTER_BIN": str(tmp_path / "mlx-cluster"),
        "MLX_CLUSTER_ARGS": "--insecure",
    }

    def run(action: str) -> list[str]:
        script = [str(LAUNCH / "start-over-ssh.sh"), action, "mini1=me@10.0.0.1"]
        done = subprocess.run(script, capture_output=True, text=True, timeout=30, cwd=tmp_path, env=environ, check=True)
        return done.stdout.splitlines()

    assert run("start") == ["to me@10.0.0.1", "mini1 started, log in .mlx-cluster-mini1.log"]
    assert run("start")[1] == "mini1 runs already"
    assert run("status")[1] == "mini1 runs"
    assert run("stop")[1] == "mini1 stopped"
    assert run("stop")[1] == "mini1 does not run"
