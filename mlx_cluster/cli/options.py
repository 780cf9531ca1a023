"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_cluster.errors import ConfigError

if TYPE_CHECKING:
    from mlx_cluster.config.load import Loaded

ConfigDir = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="DIR", help="Directory that holds cluster.yaml.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the configuration, such as log.level=debug."),
]


def load_config(config_dir: Path | None, assignments: Sequence[str] | None = None, **manual: Any) -> Loaded:
    """The layers of this process: files, environment and what the command line says."""
    from mlx_cluster.config.load import load

    return load(config_dir, environ=os.environ, manual={**parse_assignments(assignments or ()), **manual})


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["log.level=debug"]`` → ``{"log.level": "debug"}``; a value is read as in a YAML file."""
    from mlx_cluster.config.document import parse_value

    values: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text!r}: write KEY=VALUE, such as log.level=debug")
        values[key] = parse_value(value, f"--set {key}")
    return values
