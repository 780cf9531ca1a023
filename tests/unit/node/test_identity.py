from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError
from mlx_cluster.node import machine
from mlx_cluster.node.identity import identify, ipv4_of

NODES = [
    {"host": "mini1.local", "node_id": 0, "ports": [8100, 8101, 8102]},
    {"host": "mini2.local", "node_id": 1, "ports": [8200, 8201, 8202]},
]


def settings(entries: list[dict[str, Any]], **sections: Any) -> Settings:
    return Settings.model_validate({"cluster": {"name": "c", "nodes": entries}, **sections})


@pytest.mark.parametrize("ref", ["mini2", "1", "node_1", "mini2.local"])
def test_a_node_is_found_by_any_of_its_names(ref: str) -> None:
    identity = identify(settings(NODES, network={"insecure": True}), ref)
    assert (identity.node_id, identity.name) == (1, "mini2")
    assert identity.comms_address == "mini2.local:8201"
    assert identity.peers == {0: "mini1.local:8101"}
    assert identity.ports.admin == 8204
    assert [m.name for m in identity.members] == ["mini1", "mini2"]


def test_a_gateway_on_loopback_says_so() -> None:
    identity = identify(settings(NODES, network={"insecure": True}), "mini1")
    assert identity.gateway_url == "http://127.0.0.1:8000"
    opened = settings(NODES, network={"insecure": True}, api_gateway={"host": "0.0.0.0"})
    assert identify(opened, "mini1").gateway_url == "http://mini1.local:8000"


def test_reachable_ports_need_a_word_of_the_operator() -> None:
    with pytest.raises(ConfigError, match="insecure"):
        identify(settings(NODES), "mini1")


def test_unknown_nodes_and_empty_clusters_are_said() -> None:
    with pytest.raises(ConfigError, match="mini9"):
        identify(settings(NODES), "mini9")
    with pytest.raises(ConfigError, match=r"cluster\.nodes is empty"):
        identify(settings([]), "mini1")


def test_state_is_kept_per_cluster_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    local = [{**node, "host": "127.0.0.1", "name": f"n{node['node_id']}"} for node in NODES]
    assert str(identify(settings(local), "n1").state_dir) == "/somewhere/mlx-cluster/c/n1"
    given = settings(local, nodes={"n1": {"state_dir": "/given"}})
    assert str(identify(given, "n1").state_dir) == "/given"


def test_the_ring_wants_an_ipv4_literal() -> None:
    assert ipv4_of("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigError, match="IPv4"):
        ipv4_of("no-such-host.invalid")


def test_the_machine_has_memory_cores_and_versions() -> None:
    assert 0 < machine.free_bytes() <= machine.total_bytes()
    assert machine.cores() >= 1
    assert machine.versions().startswith("mlx-cluster ")
    assert {"grpc", "ring"} <= set(machine.transports())


def test_an_agent_never_imports_mlx() -> None:
    code = (
        "import sys, mlx_cluster.node.main; "
        "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')); "
        "sys.exit(', '.join(bad[:5]) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_further_addresses_of_the_others_are_comms_addresses() -> None:
    more = {"mini1": {"addresses": ["169.254.7.3", "fe80::3"]}, "mini2": {"addresses": ["169.254.7.4"]}}
    identity = identify(settings(NODES, network={"insecure": True}, nodes=more), "mini2")
    assert identity.other_addresses == {0: ("169.254.7.3:8101", "[fe80::3]:8101")}
    with pytest.raises(ValueError, match="cannot be"):
        settings(NODES, nodes={"mini1": {"addresses": ["*"]}})
