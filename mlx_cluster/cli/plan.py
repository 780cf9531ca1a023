"""``mlx-cluster plan``: who would get which layers, without starting anything."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_cluster.cli.options import Assignments, ConfigDir, load_config, parse_assignments

if TYPE_CHECKING:
    from mlx_cluster.cluster.placement import NodeBudget, Placement
    from mlx_cluster.config.schema import Settings


def plan(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, a model directory, or a model of the configuration.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-n", min=1, help="How many nodes (default 3).")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="10/9/9", help="Layers of each node.")] = None,
    config: ConfigDir = None,
    objective: Annotated[
        str, typer.Option("--objective", help="throughput (many requests) or latency (one request).")
    ] = "throughput",
    assignments: Assignments = None,
) -> None:
    """Print who gets which layers, how many bytes, and why. Nothing is started or downloaded."""
    from mlx_cluster import log
    from mlx_cluster.errors import ConfigError

    log.configure("error")  # what a node would log stands in this command's own error
    if objective not in ("throughput", "latency"):
        raise ConfigError(f"--objective {objective}: choose throughput or latency")
    if config is not None and model is None and split is None:
        settings = load_config(config, assignments).settings
    else:
        settings = _composed(model, nodes, split, config, assignments)
    for model_id in settings.models:
        placement, warnings = placed(settings, model_id, objective)
        _print(settings, model_id, placement, warnings)


def _composed(
    model: str | None, nodes: int | None, split: str | None, config: Path | None, assignments: list[str] | None
) -> Settings:
    import os

    from mlx_cluster.cli.compose import UpOptions, compose

    options = UpOptions(model, nodes, split, config_dir=config, assignments=parse_assignments(assignments or ()))
    with tempfile.TemporaryDirectory(prefix="mlx-cluster-") as folder:
        return compose(options, os.environ, Path(folder)).settings


def placed(settings: Settings, model_id: str, objective: str) -> tuple[Placement, list[str]]:
    """The placement that a coordinator would choose now, and warnings about estimates."""
    import asyncio

    from mlx_cluster.cluster.placement import ManualRange, estimate_warnings, place
    from mlx_cluster.config.names import manual_stages, node_name
    from mlx_cluster.errors import CheckpointError, ConfigError
    from mlx_cluster.node.models import LocalModels
    from mlx_cluster.node.placer import costs_of

    entries = sorted(settings.cluster.nodes, key=lambda entry: entry.node_id)
    if not entries:
        raise ConfigError("cluster.nodes is empty: name at least one node", key="cluster.nodes")
    local = LocalModels(settings, entries[0])
    asyncio.run(local.refresh())
    found = local.get(model_id)
    if found is None:
        raise CheckpointError(dict(local.missing).get(model_id, f"{model_id} is not on this machine"))
    stages = manual_stages(settings, settings.models[model_id])
    placement = place(
        costs_of(found.facts, found.facts.dense_ratio),
        budgets(settings),
        manual=[ManualRange(stage.node_id, stage.start, stage.end) for stage in stages],
        objective="latency" if objective == "latency" else "throughput",
    )
    estimates = {stage.node_id: stage.estimated_bytes for stage in stages if stage.estimated_bytes is not None}
    names = {entry.node_id: node_name(entry) for entry in entries}
    return placement, estimate_warnings(placement, estimates, names)


def budgets(settings: Settings) -> list[NodeBudget]:
    """``memory_budget`` of each node; for nodes on this machine else their share of its free memory."""
    from mlx_cluster.cluster.placement import NodeBudget
    from mlx_cluster.config.names import is_loopback, node_name, settings_of_node
    from mlx_cluster.config.quantity import parse_bytes
    from mlx_cluster.node.machine import free_bytes

    here = sum(is_loopback(entry.host) for entry in settings.cluster.nodes)
    result: list[NodeBudget] = []
    for entry in sorted(settings.cluster.nodes, key=lambda e: e.node_id):
        said = settings_of_node(settings, entry).memory_budget
        share = free_bytes() // here if is_loopback(entry.host) else None
        result.append(NodeBudget(entry.node_id, node_name(entry), parse_bytes(said) if said else share))
    return result


def _print(settings: Settings, model_id: str, placement: Placement, warnings: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mlx_cluster.config.names import node_name
    from mlx_cluster.config.quantity import format_bytes

    names = {entry.node_id: node_name(entry) for entry in settings.cluster.nodes}
    table = Table(
        "stage", "node", "layers", "bytes", "why", title=f"{model_id}: {placement.reason}", title_justify="left"
    )
    for stage in placement.stages:
        a = stage.assignment
        table.add_row(
            str(a.index),
            names[a.node_id],
            f"[{a.start}-{a.end})".replace("[", r"\["),
            format_bytes(stage.memory_bytes),
            stage.reason,
        )
    console = Console()
    console.print(table)
    for line in warnings:
        console.print(f"warning: {line}", highlight=False, markup=False)
