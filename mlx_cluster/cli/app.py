"""The command's root: names the commands, prints errors of the tree in one line.

Invariant: importing this module imports nothing heavy; each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from mlx_cluster.cli.chat import chat
from mlx_cluster.cli.config import explain
from mlx_cluster.cli.coordinator import coordinator_app
from mlx_cluster.cli.doctor import doctor
from mlx_cluster.cli.node import node_app
from mlx_cluster.cli.plan import plan
from mlx_cluster.cli.status import status
from mlx_cluster.cli.up import up
from mlx_cluster.cli.version import version
from mlx_cluster.cli.witness import witness
from mlx_cluster.errors import ClusterError

app = typer.Typer(
    name="mlx-cluster",
    help="One language model served by several machines with MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Settings and where they come from.", no_args_is_help=True)
config_app.command("explain")(explain)
app.command("up")(up)
app.add_typer(node_app, name="node")
app.add_typer(coordinator_app, name="coordinator")
app.command("witness")(witness)
app.command("status")(status)
app.command("plan")(plan)
app.command("chat")(chat)
app.command("doctor")(doctor)
app.add_typer(config_app, name="config")
app.command("version")(version)


def main() -> NoReturn:
    """Run and exit: 2 with one line on standard error for every error that a person can act on."""
    try:
        app()
    except ClusterError as error:
        print(f"mlx-cluster: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
