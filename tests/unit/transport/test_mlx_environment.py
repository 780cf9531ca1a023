"""What surrounds the forming of an mlx group."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_cluster.errors import LinkUnavailable
from mlx_cluster.transport.mlx_environment import (
    backend_environment,
    check_port_is_free,
    ipv4_literal,
    set_environment,
)

ADDRESSES = ["10.0.0.1:18100", "10.0.0.2:18100"]


def test_the_ring_reads_rank_and_hostfile(tmp_path: Path) -> None:
    environment = backend_environment("ring", 1, 2, ADDRESSES, tmp_path / "ring.json")
    assert environment == {"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "ring.json")}


def test_nccl_meets_at_rank_0(tmp_path: Path) -> None:
    environment = backend_environment("nccl", 1, 2, ADDRESSES, tmp_path)
    assert environment == {
        "MLX_RANK": "1",
        "MLX_WORLD_SIZE": "2",
        "NCCL_HOST_IP": "10.0.0.1",
        "NCCL_PORT": "18100",
    }


def test_jaccl_needs_its_device_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_IBV_DEVICES", raising=False)
    with pytest.raises(LinkUnavailable, match=r"mlx\.distributed_config"):
        backend_environment("jaccl", 0, 2, ADDRESSES, tmp_path)
    monkeypatch.setenv("MLX_IBV_DEVICES", str(tmp_path / "devices.json"))
    assert backend_environment("jaccl", 0, 2, ADDRESSES, tmp_path)["MLX_JACCL_COORDINATOR"] == ADDRESSES[0]


def test_an_operators_libmpi_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MPI_LIBNAME", "libmpi-of-the-site.so")
    assert "MLX_MPI_LIBNAME" not in backend_environment("mpi", 0, 2, [], tmp_path)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LinkUnavailable, match="gloo"):
        backend_environment("gloo", 0, 2, ADDRESSES, tmp_path)


def test_variables_stand_for_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setenv("MLX_HOSTFILE", "before")
    with set_environment({"MLX_RANK": "1", "MLX_HOSTFILE": "during"}):
        assert (os.environ["MLX_RANK"], os.environ["MLX_HOSTFILE"]) == ("1", "during")
    assert "MLX_RANK" not in os.environ
    assert os.environ["MLX_HOSTFILE"] == "before"


async def test_names_become_ipv4_literals() -> None:
    assert await ipv4_literal("localhost:18100") == "127.0.0.1:18100"


@pytest.mark.parametrize("address", ["[::1]:18100", "no-port", "no-such-host.invalid:1"])
async def test_what_has_no_ipv4_address_is_refused(address: str) -> None:
    with pytest.raises(LinkUnavailable, match="IPv4"):
        await ipv4_literal(address)


def test_a_taken_ring_port_is_refused_before_the_group_would_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LinkUnavailable, match=f"127.0.0.1:{port}.*lease another port"):
            check_port_is_free(f"127.0.0.1:{port}")
    check_port_is_free(f"127.0.0.1:{port}")
