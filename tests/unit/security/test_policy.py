"""Nothing listens to other machines by accident."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_cluster.config.load import load
from mlx_cluster.config.names import find_node
from mlx_cluster.config.schema import Settings
from mlx_cluster.config.simulated import simulated_settings
from mlx_cluster.errors import ConfigError
from mlx_cluster.security.policy import check_all, gateway_host, node_host

REAL = [{"host": "mini1.local", "node_id": 0}, {"host": "10.0.0.2", "node_id": 1}]


def settings(**manual: Any) -> Settings:
    return load(None, manual={key.replace("__", "."): value for key, value in manual.items()}).settings


def test_a_simulated_cluster_stays_on_loopback() -> None:
    made = simulated_settings()
    check_all(made)
    assert gateway_host(made) == "127.0.0.1"
    assert {node_host(made, node) for node in made.cluster.nodes} == {"127.0.0.1"}


def test_other_machines_are_refused_without_the_word_insecure() -> None:
    made = settings(cluster__nodes=REAL)
    with pytest.raises(ConfigError, match=r"network\.insecure: true") as caught:
        node_host(made, find_node(made, "mini1"))
    assert caught.value.key == "cluster.nodes"


def test_insecure_opens_the_address_that_peers_dial() -> None:
    made = settings(cluster__nodes=REAL, network__insecure=True)
    assert [node_host(made, node) for node in made.cluster.nodes] == ["0.0.0.0", "10.0.0.2"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "gateway.example"])
def test_the_gateway_is_refused_an_open_address(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gateway_host(settings(api_gateway__host=host))
    assert caught.value.key == "api_gateway.host"
    assert gateway_host(settings(api_gateway__host=host, network__insecure=True)) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_word(host: str) -> None:
    assert gateway_host(settings(api_gateway__host=host)) == host


def test_bind_of_one_node_wins_and_is_checked() -> None:
    made = settings(cluster__nodes=REAL, nodes__mini1__bind="127.0.0.1")
    assert node_host(made, find_node(made, "mini1")) == "127.0.0.1"
    made = settings(cluster__nodes=REAL, nodes__mini1__bind="10.0.0.9")
    with pytest.raises(ConfigError) as caught:
        node_host(made, find_node(made, 0))
    assert caught.value.key == "nodes.mini1.bind"


def test_further_addresses_open_all_of_them_and_need_the_word() -> None:
    made = settings(cluster__nodes=REAL, nodes__node_1__addresses=["169.254.7.3"], network__insecure=True)
    assert [node_host(made, node) for node in made.cluster.nodes] == ["0.0.0.0", "0.0.0.0"]
    made = settings(cluster__nodes=[{"host": "127.0.0.1", "node_id": 0}], nodes__node_0__addresses=["169.254.7.3"])
    with pytest.raises(ConfigError, match=r"network\.insecure: true") as caught:
        node_host(made, find_node(made, 0))
    assert (caught.value.key or "").endswith(".addresses")
    made = settings(cluster__nodes=REAL, nodes__node_1__addresses=["10.0.0.2"], network__insecure=True)
    assert node_host(made, find_node(made, 1)) == "10.0.0.2", "its own host again is no further address"
