"""``mlx-cluster status``: who is up, who holds which layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_cluster.cli.options import ConfigDir, load_config
from mlx_cluster.errors import Unavailable

if TYPE_CHECKING:
    from mlx_cluster.cli.view import StageView


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print the admin API's answer.")] = False,
    url: Annotated[
        str | None, typer.Option("--url", help="Of any node's admin API (default: those of the configuration).")
    ] = None,
    config: ConfigDir = None,
) -> None:
    """Print the cluster's nodes and pipelines."""
    import asyncio
    import json

    urls = [url.rstrip("/").removesuffix("/cluster")] if url else admin_urls(config)
    data = asyncio.run(_ask(urls))
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        _print(data)


def admin_urls(config: Any = None) -> list[str]:
    """Where the nodes' admin APIs are; without a configuration, those of a local cluster with default ports."""
    from mlx_cluster.config.ports import plan_ports
    from mlx_cluster.config.simulated import simulated_settings

    settings = load_config(config).settings if config is not None else simulated_settings()
    ports = plan_ports(settings)
    return [f"http://{entry.host}:{ports[entry.node_id].admin}" for entry in settings.cluster.nodes]


async def _ask(urls: list[str]) -> dict[str, Any]:
    import httpx

    from mlx_cluster.cli.view import ask_json

    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
        for url in urls:
            data = await ask_json(client, f"{url}/cluster")
            if data is not None:
                return data
    raise Unavailable(
        f"no node answers at {', '.join(urls)}: start one with 'mlx-cluster up', or say --url or --config"
    )


def _stage_line(stage: StageView) -> str:
    """The stage, and what its link to the next one carries now."""
    from mlx_cluster.config.quantity import format_bytes

    rate = stage.sent_bytes_per_second
    return f"{stage} sends {format_bytes(round(rate))}/s" if rate else str(stage)


def _print(data: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mlx_cluster.cli.coordinator import coordinator_lines, recovery_lines
    from mlx_cluster.cli.view import ClusterView
    from mlx_cluster.config.quantity import format_bytes

    view = ClusterView.from_json(data)
    console = Console()
    console.print(f"cluster {view.cluster}", highlight=False)
    for line in coordinator_lines(data):
        console.print(line, highlight=False, markup=False)
    nodes = Table("node", "id", "state", "pid", "host", "gateway", "round trips", "detail")
    names = {node.node_id: node.name for node in view.nodes}
    for node in view.nodes:
        state = f"{node.state}, drained" if node.drained else node.state
        trips = "\n".join(f"{names.get(i, i)} {seconds * 1e3:.2f} ms" for i, seconds in node.round_trips)
        nodes.add_row(
            node.name, str(node.node_id), state, str(node.pid or ""), node.host, node.gateway_url, trips, node.detail
        )
    console.print(nodes)
    pipelines = Table("model", "state", "epoch", "stages", "memory", "transport", "detail")
    for p in view.pipelines:
        memory = sum(stage.memory_bytes or 0 for stage in p.stages)
        pipelines.add_row(
            p.model,
            p.state,
            p.epoch,
            "\n".join(_stage_line(stage) for stage in p.stages),
            format_bytes(memory) if memory else "",
            f"{p.transport}\n{p.transport_reason}".strip(),
            p.detail,
        )
    console.print(pipelines)
    recoveries = recovery_lines(data)
    if recoveries:
        console.print("last recoveries", *recoveries, sep="\n", highlight=False, markup=False)
