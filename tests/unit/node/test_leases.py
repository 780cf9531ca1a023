from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mlx_cluster.errors import LinkUnavailable
from mlx_cluster.node.leases import PortLeases

HOST = "127.0.0.1"


def three_free_ports() -> int:
    """The first of three neighbouring ports that nobody listens on."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            first = int(probe.getsockname()[1])
        try:
            for port in range(first, first + 3):
                with socket.socket() as each:
                    each.bind((HOST, port))
        except (OSError, OverflowError):
            continue
        return first


def test_leases_of_two_agents_never_meet_and_come_back(tmp_path: Path) -> None:
    low = three_free_ports()
    one, two = (PortLeases(low, low + 2, tmp_path, seed=seed) for seed in (1, 2))
    leases = [one.lease(HOST), two.lease(HOST), one.lease(HOST)]
    assert sorted(lease.port for lease in leases) == [low, low + 1, low + 2]
    with pytest.raises(LinkUnavailable, match=rf"\[{low}, {low + 2}\]"):
        two.lease(HOST)
    leases[1].release()
    leases[1].release()
    assert one.lease(HOST).port == leases[1].port


def test_a_port_somebody_listens_on_is_passed_over(tmp_path: Path) -> None:
    low = three_free_ports()
    with socket.socket() as listener:
        listener.bind((HOST, low))
        listener.listen()
        leases = PortLeases(low, low + 1, tmp_path)
        assert leases.lease(HOST).port == low + 1
        with pytest.raises(LinkUnavailable):
            leases.lease(HOST)
