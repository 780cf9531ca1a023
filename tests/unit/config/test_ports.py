"""Which port is whose, and clashes before anything starts."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.config.load import load
from mlx_cluster.config.ports import PortUse, base_port, check_free, plan_ports, uses
from mlx_cluster.config.schema import Settings
from mlx_cluster.config.simulated import simulated_names, simulated_settings
from mlx_cluster.errors import ConfigError, PortInUse


def settings(nodes: list[dict[str, Any]], **more: Any) -> Settings:
    return load(None, manual={"cluster.nodes": nodes, **more}).settings


def test_bases_skip_the_coordinators_block() -> None:
    assert [base_port(i) for i in range(5)] == [8100, 8200, 8300, 8500, 8600]


def test_the_simulated_three() -> None:
    planned = plan_ports(simulated_settings())
    assert [list(p.uses().values()) for p in planned.values()] == [
        [8100, 8101, 8102, 8103, 8104, 8000],
        [8200, 8201, 8202, 8203, 8204, 8001],
        [8300, 8301, 8302, 8303, 8304, 8002],
    ]
    assert simulated_names(5) == ("mini1", "mini2", "master", "node4", "node5")


def test_nodes_on_several_hosts_share_the_gateways_port() -> None:
    planned = plan_ports(
        settings([{"host": "a", "node_id": 0}, {"host": "b", "node_id": 1}, {"host": "c", "node_id": 3}])
    )
    assert {p.gateway for p in planned.values()} == {8000}
    assert [p.node_api for p in planned.values()] == [8100, 8200, 8500]


def test_explicit_ports_win_and_the_rest_follows_the_first() -> None:
    planned = plan_ports(settings([{"host": "a", "node_id": 0, "ports": [9100, 7000]}]))
    assert list(planned[0].uses().values())[:5] == [9100, 7000, 9102, 9103, 9104]


@given(st.integers(1, 64), st.sampled_from([8100, 8350, 8400, 9000, 20000]), st.sampled_from([8000, 30000]))
def test_a_simulated_cluster_never_clashes_with_itself(num_nodes: int, base: int, gateway: int) -> None:
    made = simulated_settings(num_nodes, base, gateway).model_copy(
        update={"network": Settings().network.model_copy(update={"mlx_port_range": (60000, 60999)})}
    )
    planned = plan_ports(made)
    ports = [use.port for use in uses(made, planned)]
    assert len(ports) == len(set(ports)) == 6 * num_nodes
    assert made.coordinator.port not in ports
    assert not any(8400 <= port < 8500 for port in ports if base != 8400)


@pytest.mark.parametrize(
    ("nodes", "more", "words"),
    [
        (
            [
                {"host": "a", "name": "x", "node_id": 0, "ports": [9100]},
                {"host": "a", "name": "y", "node_id": 1, "ports": [9101]},
            ],
            {},
            "port 9101 on a is wanted twice: x's comms and y's node API",
        ),
        ([{"host": "a", "node_id": 0, "ports": [7999]}], {}, "a's comms and a's gateway"),
        ([{"host": "a", "node_id": 0, "ports": [8400]}], {}, "and the coordinator"),
        ([{"host": "a", "node_id": 0, "ports": [18100]}], {}, "mlx_port_range"),
        ([{"host": "a", "node_id": 0}], {"network.mlx_port_range": [19000, 18000]}, "runs backwards"),
        ([{"host": "a", "node_id": 0, "ports": [65533]}], {}, "would need port 65536"),
    ],
)
def test_clashes_are_named(nodes: list[dict[str, Any]], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_ports(settings(nodes, **more))
    assert words in str(caught.value)


def test_a_taken_port_is_named_with_its_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            check_free([PortUse("127.0.0.1", port, "mini1's gateway")])
        text = str(caught.value)
        assert f"port {port} on 127.0.0.1 is taken, mini1's gateway wants it" in text
        assert "--gateway-port" in text
        with pytest.raises(PortInUse, match="--base-port"):
            check_free([PortUse("mini1.local", port, "mini1's comms")])
    check_free([PortUse("127.0.0.1", port, "mini1's gateway")])
