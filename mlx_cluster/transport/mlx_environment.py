"""What an mx.distributed backend needs around it before its group can be formed: variables, addresses, a free port.

Owns: the environment of each backend, set for the time of ``init`` only, and IPv4 literals for the ring.
Does not own: mlx itself (``mlx_link`` calls it), or which ports are leased.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from mlx_cluster.errors import LinkUnavailable


def backend_environment(backend: str, rank: int, size: int, addresses: Sequence[str], hostfile: Path) -> dict[str, str]:
    """The variables that this backend's ``init`` reads; ``addresses`` are "ip:port" by rank."""
    match backend:
        case "ring":
            return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
        case "mpi":
            # Sends and receives come from two threads at once, and mlx calls MPI_Init, which promises nothing of the
            # kind unless Open MPI is told so (3 = MPI_THREAD_MULTIPLE).
            return {"OMPI_MPI_THREAD_LEVEL": "3", **_mpi_library()}
        case "jaccl":
            if "MLX_IBV_DEVICES" not in os.environ:
                raise LinkUnavailable(
                    "jaccl needs MLX_IBV_DEVICES, the file that says which RDMA device joins which Macs: "
                    "write it with mlx.distributed_config --backend jaccl"
                )
            return {"MLX_RANK": str(rank), "MLX_JACCL_COORDINATOR": addresses[0]}
        case "nccl":
            host, _, port = addresses[0].rpartition(":")
            return {"MLX_RANK": str(rank), "MLX_WORLD_SIZE": str(size), "NCCL_HOST_IP": host, "NCCL_PORT": port}
        case _:
            raise LinkUnavailable(f"mlx has no distributed backend {backend!r}: use ring, mpi, jaccl or nccl")


def _mpi_library() -> dict[str, str]:
    """Where the ``openmpi`` package keeps libmpi, unless the operator or the system's loader knows one."""
    if "MLX_MPI_LIBNAME" in os.environ:
        return {}
    try:
        distribution = metadata.distribution("openmpi")
    except metadata.PackageNotFoundError:
        return {}  # mlx looks for the system's own
    for file in distribution.files or ():
        if file.name in ("libmpi.so.40", "libmpi.40.dylib"):
            return {"MLX_MPI_LIBNAME": str(Path(str(distribution.locate_file(file))).resolve())}
    return {}


@contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the time of ``init`` only: left behind, a child process would take itself for this rank."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def ipv4_literal(address: str) -> str:
    """ "host:port" → "ip:port": the ring's sockets know nothing else."""
    host, _, port = address.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, int(port), family=socket.AF_INET, type=socket.SOCK_STREAM
        )
    except (OSError, ValueError) as error:
        raise LinkUnavailable(f"{address!r} is not host:port with an IPv4 address: {error}") from error
    return f"{found[0][4][0]}:{port}"


def check_port_is_free(address: str) -> None:
    """The ring binds with SO_REUSEPORT, so two groups on one port would steal each other's connections unseen."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise LinkUnavailable(
                f"the ring cannot listen on {address}: {error.strerror}; lease another port"
            ) from error
