"""``mlx-cluster node``: run this machine's agent; ``node drain``, ``undrain`` and ``remove`` for any of them."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_cluster.cli.options import Assignments, ConfigDir, load_config
from mlx_cluster.errors import ConfigError

if TYPE_CHECKING:
    from mlx_cluster.config.schema import Settings

# What an agent may take to end in good order after its launcher vanished, before a kernel timer ends it.
ORPHAN_GRACE_SECONDS = 6.0
# An orphan's exit is no success: mpirun takes the other ranks down only then.
ORPHAN_EXIT_CODE = 3


node_app = typer.Typer(help="Run the agent of one node, or take work off a node.")


@node_app.callback(invoke_without_command=True)
def node(
    context: typer.Context,
    config: ConfigDir = None,
    node_id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="NODE", help="Name or id of the node: mini1, node_0 or 0. Default: the host's name."
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen to other machines without authentication and TLS.")
    ] = False,
    assignments: Assignments = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", hidden=True)] = False,
) -> None:
    """Run the agent of one node until SIGTERM or Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise ConfigError("--config is missing: name the directory that holds cluster.yaml", key="config")
    manual = {"network.insecure": True} if insecure else {}
    loaded = load_config(config, assignments, **manual)
    name = find_own_node(loaded.settings, node_id, socket.gethostname())
    orphaned = watch_launcher() if lifeline else []

    from mlx_cluster.node.main import run_node

    code = run_node(loaded, name)
    raise typer.Exit(ORPHAN_EXIT_CODE if orphaned else code)


@node_app.command("drain")
def drain(
    name: Annotated[str, typer.Argument(help="Name or id of the node.")],
    url: Annotated[str | None, typer.Option("--url", help="Of any node's admin API.")] = None,
    config: ConfigDir = None,
) -> None:
    """Move a node's work to the others and give it no more."""
    _command(name, "drain", url, config)
    typer.echo(f"{name} is drained: it gets no new work, and what it holds moves as soon as the others can take it")


@node_app.command("undrain")
def undrain(
    name: Annotated[str, typer.Argument(help="Name or id of the node.")],
    url: Annotated[str | None, typer.Option("--url", help="Of any node's admin API.")] = None,
    config: ConfigDir = None,
) -> None:
    """Let a drained node work again."""
    _command(name, "undrain", url, config)
    typer.echo(f"{name} may get work again")


@node_app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Name or id of a node that is dead and will not come back.")],
    url: Annotated[str | None, typer.Option("--url", help="Of any node's admin API.")] = None,
    config: ConfigDir = None,
) -> None:
    """Take a dead node's vote away for good, so that a majority is counted without it.

    Refused while the node lives. If it does come back it joins anew, like a node that was never there.
    """
    _command(name, "remove", url, config)
    typer.echo(f"{name} no longer votes; take it out of cluster.nodes on the other nodes when it shall not come back")


def _command(name: str, verb: str, url: str | None, config: Path | None) -> None:
    from mlx_cluster.cli.coordinator import ask

    ask("POST", f"/nodes/{name}/{verb}", {}, url, config)


def find_own_node(settings: Settings, ref: str | None, hostname: str) -> str:
    """The node that ``ref`` means, or the one whose name or host is this machine's. Raises ``ConfigError``."""
    from mlx_cluster.config.names import find_node, node_name

    if ref is not None:
        return node_name(find_node(settings, ref))
    label = hostname.partition(".")[0].lower()
    for entry in settings.cluster.nodes:
        if label in (node_name(entry).lower(), entry.host.partition(".")[0].lower()):
            return node_name(entry)
    names = ", ".join(node_name(entry) for entry in settings.cluster.nodes)
    raise ConfigError(
        f"this machine is called {label!r} and no node is: say --id; cluster.nodes has {names or 'no nodes'}"
    )


def watch_launcher() -> list[bool]:
    """End in good order when the launcher is gone. The list that is returned is not empty from then on."""
    from mlx_cluster import lifeline

    orphaned: list[bool] = []

    def on_lost() -> None:
        orphaned.append(True)
        lifeline.arm(ORPHAN_GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    # No death signal: the agent stops its stage processes first, and they die by their own lifelines at the worst.
    lifeline.watch_parent(on_lost, death_signal=None)
    return orphaned
