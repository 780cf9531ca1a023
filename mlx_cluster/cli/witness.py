"""``mlx-cluster witness``: a third voter for a cluster of two nodes."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_cluster.cli.node import ORPHAN_EXIT_CODE, watch_launcher
from mlx_cluster.cli.options import Assignments, ConfigDir, load_config
from mlx_cluster.errors import ConfigError


def witness(
    config: ConfigDir = None,
    assignments: Assignments = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", hidden=True)] = False,
) -> None:
    """Vote at cluster.witness until SIGTERM or Ctrl-C; any small machine will do."""
    if config is None:
        raise ConfigError("--config is missing: name the directory that holds cluster.yaml", key="config")
    loaded = load_config(config, assignments)

    orphaned = watch_launcher() if lifeline else []

    from mlx_cluster.node.witness import run_witness

    code = run_witness(loaded)
    raise typer.Exit(ORPHAN_EXIT_CODE if orphaned else code)
