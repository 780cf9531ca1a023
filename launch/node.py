#!/usr/bin/env python3
"""The script that ``mlx.launch`` runs on every host: one node agent, its id taken from MLX_RANK.

The agent computes nothing with mlx, so it must not look like a rank: MLX_RANK and MLX_HOSTFILE are taken out of the
environment before anything else, or its stage processes would join the launcher's group instead of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

# What mlx.launch sets for its backends, ring, jaccl and nccl.
LAUNCHER_VARIABLES = (
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_WORLD_SIZE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
    "NCCL_HOST_IP",
    "NCCL_PORT",
)
KEPT_FOR_STAGES = ("MLX_IBV_DEVICES",)  # which RDMA device joins which Macs: the jaccl link reads it


def take_rank(environ: MutableMapping[str, str]) -> int:
    """The rank, after removing every trace of the launcher. Raises ``SystemExit`` when there is none."""
    text = environ.get("MLX_RANK", "")
    for name in LAUNCHER_VARIABLES:
        if name not in KEPT_FOR_STAGES:
            environ.pop(name, None)
    if not text.isdigit():
        raise SystemExit(
            "launch/node.py: MLX_RANK is not set: start this script with mlx.launch, or a node with mlx-cluster node"
        )
    return int(text)


def node_of_rank(node_ids: list[int], rank: int) -> int:
    """Rank r is the r-th node of cluster.yaml by id. Raises ``SystemExit`` when there are fewer nodes."""
    if rank >= len(node_ids):
        raise SystemExit(f"launch/node.py: rank {rank}, but cluster.nodes has {len(node_ids)} nodes: one host per node")
    return sorted(node_ids)[rank]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one node of the cluster as a rank of mlx.launch.")
    parser.add_argument("--config", type=Path, default=Path(__file__).resolve().parents[1] / "config")
    parser.add_argument("--insecure", action="store_true", help="listen to other machines without TLS")
    options = parser.parse_args()
    rank = take_rank(os.environ)

    from mlx_cluster.config.load import load
    from mlx_cluster.errors import ClusterError
    from mlx_cluster.node.main import run_node

    try:
        manual = {"network.insecure": True} if options.insecure else {}
        loaded = load(options.config, environ=os.environ, manual=manual)
        node_ids = [entry.node_id for entry in loaded.settings.cluster.nodes]
        return run_node(loaded, str(node_of_rank(node_ids, rank)))
    except ClusterError as error:
        print(f"mlx-cluster: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
