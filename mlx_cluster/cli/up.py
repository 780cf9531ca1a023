"""``mlx-cluster up``: a whole cluster on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_cluster.cli.options import Assignments, ConfigDir, parse_assignments

if TYPE_CHECKING:
    from mlx_cluster.cli.launcher import Terminal
    from mlx_cluster.config.schema import Settings


def up(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, a model directory, or a Hugging Face repository.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-n", min=1, help="How many nodes (default 3).")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="10/9/9", help="Layers of each node.")] = None,
    transport: Annotated[
        str | None, typer.Option("--transport", "-t", help="auto, ring, grpc or mpi: how hidden states travel.")
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option("--gateway-port", help="Of the first node (default 8000).")
    ] = None,
    base_port: Annotated[int | None, typer.Option("--base-port", help="Of the first node (default 8100).")] = None,
    config: ConfigDir = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="Another name for the model; may be given again.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the nodes log.")] = False,
    assignments: Assignments = None,
) -> None:
    """Start a cluster of local processes and serve a model until Ctrl-C.

    With --config its nodes run on this machine, whatever their hosts are.
    """
    import asyncio
    import tempfile

    from mlx_cluster.cli.compose import UpOptions, compose
    from mlx_cluster.cli.launcher import commands_of, serve
    from mlx_cluster.config.load import ENVIRONMENT_PREFIX

    options = UpOptions(
        model,
        nodes,
        split,
        transport,
        gateway_port,
        base_port,
        config,
        tuple(alias or ()),
        verbose,
        parse_assignments(assignments or ()),
    )
    with tempfile.TemporaryDirectory(prefix="mlx-cluster-", ignore_cleanup_errors=True) as folder:
        run_dir = Path(folder)
        settings = compose(options, os.environ, run_dir).settings
        for variable in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
            del os.environ[variable]  # the nodes' files hold its value already, below what the command line said
        check_ports(settings)
        with _terminal() as terminal:
            fetch_models(settings, terminal)
            code = asyncio.run(serve(settings, commands_of(settings, run_dir), terminal))
    raise typer.Exit(code)


def check_ports(settings: Settings) -> None:
    """Raise ``PortInUse`` or ``ConfigError`` before anything starts."""
    from mlx_cluster.config.ports import check_clashes, check_free, plan_ports, uses, witness_use
    from mlx_cluster.security.policy import check_all

    check_all(settings)
    wanted = [*uses(settings, plan_ports(settings)), *witness_use(settings)]
    check_clashes(wanted, settings)
    check_free(wanted)


def fetch_models(settings: Settings, terminal: Terminal) -> None:
    """Download once what the nodes would look for. Raises ``CheckpointError``."""
    from mlx_cluster import demo
    from mlx_cluster.config.quantity import format_bytes
    from mlx_cluster.errors import CheckpointError
    from mlx_cluster.model.checkpoint import resolve_local

    folders = [folder for node in settings.nodes.values() for folder in node.model_dirs]
    for model_id, entry in settings.models.items():
        wanted = entry.path or model_id
        if wanted == demo.MODEL_NAME:
            continue
        try:
            resolve_local(wanted, folders)
        except CheckpointError:
            from mlx_cluster.model.hub import fetch

            def tell(done: int, total: int, name: str = model_id) -> None:
                terminal.progress(f"downloading {name}: {format_bytes(done)} of {format_bytes(total)}")

            fetch(wanted, on_progress=tell)


@contextmanager
def _terminal() -> Iterator[Terminal]:
    """A status line where somebody watches, plain lines otherwise. The ready line goes to standard output."""
    from mlx_cluster.cli.launcher import Terminal

    def result(line: str) -> None:
        print(line, flush=True)

    if not sys.stderr.isatty():
        yield Terminal(result, _to_stderr, _Changes(_to_stderr).tell)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    with console.status("starting the nodes") as status:

        def finish(line: str) -> None:
            status.stop()
            result(line)

        yield Terminal(
            finish,
            lambda line: console.print(Text(line), soft_wrap=True),
            lambda line: status.update(Text(line)),
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Changes:
    """Hands on a text only when it is another one than before."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._last = tell, ""

    def tell(self, text: str) -> None:
        if text != self._last:
            self._last = text
            self._tell(text)
