"""``mlx-cluster witness``: a third voter for a cluster of two nodes."""

from __future__ import annotations

import typer

from mlx_cluster.cli.options import Assignments, ConfigDir, load_config
from mlx_cluster.errors import ConfigError


def witness(config: ConfigDir = None, assignments: Assignments = None) -> None:
    """Vote at cluster.witness until SIGTERM or Ctrl-C; any small machine will do."""
    if config is None:
        raise ConfigError("--config is missing: name the directory that holds cluster.yaml", key="config")
    loaded = load_config(config, assignments)

    from mlx_cluster.node.witness import run_witness

    raise typer.Exit(run_witness(loaded))
