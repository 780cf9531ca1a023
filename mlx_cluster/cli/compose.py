"""The settings of a cluster on this machine, from what ``mlx-cluster up`` was asked.

Owns: how the command's options become layers, and the run directory's cluster.yaml. Does not own: starting anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_cluster import demo
from mlx_cluster.config import simulated
from mlx_cluster.config.load import Loaded, load
from mlx_cluster.config.names import find_node, node_name
from mlx_cluster.config.ports import FIRST_BASE_PORT
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError

DEFAULT_NODES = 3
DEFAULT_LOG_LEVEL = "warning"  # of the nodes, whose lines stand in the launcher's terminal


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line said; None where it said nothing."""

    model: str | None = None
    num_nodes: int | None = None
    split: str | None = None
    transport: str | None = None
    gateway_port: int | None = None
    base_port: int | None = None
    config_dir: Path | None = None
    aliases: tuple[str, ...] = ()
    verbose: bool = False
    assignments: Mapping[str, Any] = field(default_factory=dict)


def compose(options: UpOptions, environ: Mapping[str, str], run_dir: Path) -> Loaded:
    """Settings with every node on this machine, written to ``run_dir`` as one cluster.yaml that holds all layers."""
    manual: dict[str, Any] = {**options.assignments}
    if options.config_dir is None:
        source = run_dir
        num_nodes = options.num_nodes or (len(options.split.split("/")) if options.split else DEFAULT_NODES)
        write_tree(_simulated(options, num_nodes), run_dir)
        model: str | None = options.model or demo.MODEL_NAME
        known: Settings | None = None
    else:
        if options.num_nodes is not None:
            raise ConfigError("--nodes and --config contradict each other: the nodes stand in the configuration")
        source = options.config_dir
        known = load(source, environ=environ, manual=manual).settings
        num_nodes = len(known.cluster.nodes)
        model = options.model or (next(iter(known.models)) if len(known.models) == 1 else None)
        manual |= _bring_here(known, options)
    if options.transport is not None:
        manual["network.transport"] = options.transport
    if options.verbose:
        manual.setdefault("log.level", "info")
    name, entry = _model_keys(options, model, num_nodes, known)
    if entry:
        manual["models"] = {name: entry}
    loaded = load(source, environ=environ, manual=manual)
    settings = loaded.settings
    if options.model is not None:
        settings = settings.model_copy(update={"models": {name: settings.models[name]}})
    if not settings.models:
        raise ConfigError("no model is configured: add one to models.yaml or say --model", key="models")
    settings = _with_own_state(settings, run_dir, quiet=("log", "level") not in loaded.provenance)
    write_tree(settings.model_dump(mode="json", exclude_defaults=True), run_dir)
    return load(run_dir)


def write_tree(tree: Mapping[str, Any], run_dir: Path) -> None:
    """One cluster.yaml that only this user can read."""
    import yaml

    path = run_dir / "cluster.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True))


def named_model(model: str, num_nodes: int) -> tuple[str, dict[str, Any]]:
    """``demo``, a directory or a repository id → its id in the API, and its entry in ``models``."""
    if model == demo.MODEL_NAME:
        return model, simulated.demo_entry(num_nodes, str(demo.model_dir()))
    directory = Path(model).expanduser()
    if directory.is_dir():
        path = directory.resolve()
        return path.name, {"path": str(path)}
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"--model {model}: no such directory; give demo, a model directory or a repository such as "
            "mlx-community/Qwen2.5-0.5B-Instruct-4bit",
            key="models",
        )
    return model.partition("/")[2], {"path": model, "aliases": [model]}


def _simulated(options: UpOptions, num_nodes: int) -> dict[str, Any]:
    return simulated.simulated_tree(
        num_nodes,
        FIRST_BASE_PORT if options.base_port is None else options.base_port,
        simulated.FIRST_GATEWAY_PORT if options.gateway_port is None else options.gateway_port,
    )


def _bring_here(settings: Settings, options: UpOptions) -> dict[str, Any]:
    """Manual keys that put a real cluster's nodes on this machine, under their own names."""
    if not settings.cluster.nodes:
        raise ConfigError("cluster.nodes is empty: name at least one node", key="cluster.nodes")
    keys = simulated.on_this_machine(settings, options.base_port)
    if options.gateway_port is not None:
        keys["api_gateway.port"] = options.gateway_port
    return keys


def _model_keys(
    options: UpOptions, model: str | None, num_nodes: int, known: Settings | None
) -> tuple[str, dict[str, Any]]:
    """(model id, what the command line says of it)."""
    if model is None:
        if options.split or options.aliases:
            raise ConfigError("--split and --alias need one model: say --model, the configuration has several")
        return "", {}
    entry: dict[str, Any]
    present = known.models.get(model) if known is not None else None
    if present is not None:
        name, entry = model, {}
        aliases = present.aliases
    else:
        name, entry = named_model(model, num_nodes)
        aliases = tuple(entry.get("aliases", ()))
    if options.aliases:
        entry["aliases"] = list(dict.fromkeys((*aliases, *options.aliases)))
    if options.split is not None:
        entry["split"] = options.split
        if present is not None and present.sharding:
            entry["sharding"] = None  # the command line's word replaces the file's
    return name, entry


def _with_own_state(settings: Settings, run_dir: Path, *, quiet: bool) -> Settings:
    """Nodes that remember in the run directory, so that they never touch what a real node of this machine knows."""
    known = {find_node(settings, ref).node_id: (ref, entry) for ref, entry in settings.nodes.items()}
    nodes = {}
    for node in settings.cluster.nodes:
        ref, entry = known.get(node.node_id, (node_name(node), None))
        state = {"state_dir": str(run_dir / "state" / node_name(node)), "bind": None}
        nodes[ref] = entry.model_copy(update=state).model_dump() if entry is not None else state
    log = settings.log.model_copy(update={"level": DEFAULT_LOG_LEVEL}) if quiet else settings.log
    cluster = settings.cluster.model_dump(exclude_defaults=True)  # some defaults may not be written in words
    if settings.cluster.witness is not None:
        cluster["witness"]["state_dir"] = str(run_dir / "state" / "witness")
    changed = {"cluster": cluster, "nodes": nodes, "log": log.model_dump()}
    return Settings.model_validate(settings.model_dump(exclude_defaults=True) | changed)
