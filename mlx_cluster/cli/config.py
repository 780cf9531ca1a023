"""``mlx-cluster config explain``: every layer's word on a setting."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_cluster.cli.options import Assignments, ConfigDir, load_config


def explain(
    key: Annotated[str, typer.Argument(help="A key or section, such as api_gateway.port or network.")],
    config: ConfigDir = None,
    assignments: Assignments = None,
) -> None:
    """Print each layer's value and who wins: defaults < files < environment < runtime < manual."""
    from mlx_cluster.config.explain import explain as explain_key

    told = explain_key(load_config(config, assignments), key)
    for entry in told:
        typer.echo(f"{entry.key} = {_shown(entry.value)}  (from {entry.winner})")
        width = max(len(o.layer) for o in entry.origins)
        for origin in entry.origins:
            mark = "→" if origin is entry.origins[-1] else " "
            place = f"  {origin.place}" if origin.place else ""
            typer.echo(f"  {mark} {origin.layer:<{width}}  {_shown(origin.value)}{place}")
    if not told:
        typer.echo(f"{key} is empty")


def _shown(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, default=str)
