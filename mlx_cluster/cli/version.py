"""``mlx-cluster version``."""

from __future__ import annotations

import typer

from mlx_cluster import __version__


def version() -> None:
    """Print the version."""
    typer.echo(f"mlx-cluster {__version__}")
