"""Rules that hold between sections: unique nodes, names that resolve, splits that cover every layer.

Owns: these rules, each error with the place of the value that is wrong. Does not own: bounds of single values
(``config.schema``) and ports (``config.ports``).
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_cluster.config.names import did_you_mean, find_node, manual_stages, node_name
from mlx_cluster.config.schema import ModelEntry, SchedulerSection, Settings
from mlx_cluster.errors import ConfigError, PlanError
from mlx_cluster.plan import check_cover

Path = tuple[str | int, ...]
PlaceOf = Callable[[Path], tuple[str | None, int | None]]


def check(settings: Settings, place_of: PlaceOf) -> None:
    """Raise ``ConfigError`` for the first rule that is broken."""
    _check_nodes(settings, place_of)
    named: dict[int, str] = {}
    for ref in settings.nodes:
        node_id = _resolve(settings, ref, ("nodes", ref), place_of)
        if node_id in named:
            raise _error(f"{ref!r} and {named[node_id]!r} are the same node: join them", ("nodes", ref), place_of)
        named[node_id] = ref
    _check_keys(settings, place_of)
    _check_chunks(settings.scheduler, ("scheduler",), place_of)
    names: dict[str, str] = {}
    for model_id, model in settings.models.items():
        _check_model(settings, model_id, model, place_of)
        for name in (model_id, *model.aliases):
            if names.setdefault(name, model_id) != model_id:
                raise _error(
                    f"{name!r} names both {names[name]!r} and {model_id!r}: rename one", ("models", model_id), place_of
                )


def _check_nodes(settings: Settings, place_of: PlaceOf) -> None:
    ids: set[int] = set()
    names: set[str] = set()
    for index, entry in enumerate(settings.cluster.nodes):
        at = ("cluster", "nodes", index)
        if entry.node_id in ids:
            raise _error(f"node_id {entry.node_id} is given twice: node ids are unique", (*at, "node_id"), place_of)
        if node_name(entry) in names:
            raise _error(
                f"two nodes are called {node_name(entry)!r}: give one of them another 'name'", (*at, "host"), place_of
            )
        if len(set(entry.ports)) != len(entry.ports):
            raise _error(f"ports {list(entry.ports)} repeat a port: each has its own use", (*at, "ports"), place_of)
        ids.add(entry.node_id)
        names.add(node_name(entry))


def _check_chunks(scheduler: SchedulerSection, at: Path, place_of: PlaceOf) -> None:
    if "min_chunk" in scheduler.model_fields_set and scheduler.min_chunk > scheduler.prefill_chunk:
        raise _error(
            f"min_chunk is {scheduler.min_chunk}, but the longest chunk (prefill_chunk) is {scheduler.prefill_chunk}: "
            "lower the one or raise the other",
            (*at, "min_chunk"),
            place_of,
        )


def _check_keys(settings: Settings, place_of: PlaceOf) -> None:
    names, hashes = {"none", "other"}, dict[str, str]()
    for index, key in enumerate(settings.api_gateway.keys):
        at = ("api_gateway", "keys", index)
        if key.name in names:
            why = "is what metrics call every key that is not listed" if key.name in ("none", "other") else "is taken"
            raise _error(f"the key's name {key.name!r} {why}: give it another", (*at, "name"), place_of)
        if key.tenant in hashes:
            raise _error(f"{key.name!r} and {hashes[key.tenant]!r} are the same key", (*at, "sha256"), place_of)
        names.add(key.name)
        hashes[key.tenant] = key.name


def _check_replicas_and_fallback(settings: Settings, model_id: str, model: ModelEntry, place_of: PlaceOf) -> None:
    at: Path = ("models", model_id)
    if model.replicas > 1 and (model.split is not None or model.sharding):
        raise _error(
            f"models.{model_id} has a manual split and {model.replicas} replicas: a split names the nodes of one "
            "pipeline; remove it, or serve the second replica as a model of its own",
            (*at, "replicas"),
            place_of,
        )
    other = model.fallback_model
    if other is None:
        return
    if other == model_id or other not in settings.models:
        raise _error(
            f"fallback_model {other!r} of models.{model_id} is not another model of this configuration"
            + did_you_mean(other, [name for name in settings.models if name != model_id]),
            (*at, "fallback_model"),
            place_of,
        )
    if settings.models[other].fallback_model is not None:
        raise _error(
            f"fallback_model {other!r} of models.{model_id} has a fallback itself: one step is all there is",
            (*at, "fallback_model"),
            place_of,
        )


def _check_model(settings: Settings, model_id: str, model: ModelEntry, place_of: PlaceOf) -> None:
    at: Path = ("models", model_id)
    _check_replicas_and_fallback(settings, model_id, model, place_of)
    if model.split is not None and model.sharding:
        raise _error(f"models.{model_id} has both 'split' and 'sharding': keep one", (*at, "split"), place_of)
    if model.batching.min_chunk is not None or model.batching.prefill_chunk is not None:
        _check_chunks(model.batching.over(settings.scheduler), (*at, "batching"), place_of)
    owners: dict[int, str] = {}
    for ref, shard in model.sharding.items():
        here = (*at, "sharding", ref)
        first, last = shard.layers
        if last < first:
            raise _error(
                f"layers [{first}, {last}] run backwards: both bounds are inclusive, the lower comes first",
                (*here, "layers"),
                place_of,
            )
        node_id = _resolve(settings, ref, here, place_of)
        if node_id in owners:
            raise _error(f"{ref!r} and {owners[node_id]!r} are the same node", here, place_of)
        owners[node_id] = ref
    what = "sharding" if model.sharding else "split"
    try:
        stages = manual_stages(settings, model)
        if stages and model.total_layers is not None:
            check_cover([(s.start, s.end) for s in stages], model.total_layers)
        elif stages:
            check_cover([(s.start, s.end) for s in stages], stages[-1].end)
        elif model.split is not None:
            raise PlanError(f"the split {model.split} gives no node any layer")
    except (ConfigError, PlanError) as error:
        raise _error(f"models.{model_id}.{what}: {error}", (*at, what), place_of) from error
    for ref, shard in model.sharding.items():
        if shard.includes_output_head and shard.layers[1] + 1 != stages[-1].end:
            raise _error(
                f"{ref!r} cannot hold the output head: the head stands on the node of the last layer "
                f"({stages[-1].end - 1})",
                (*at, "sharding", ref, "includes_output_head"),
                place_of,
            )


def _resolve(settings: Settings, ref: str, path: Path, place_of: PlaceOf) -> int:
    try:
        return find_node(settings, ref).node_id
    except ConfigError as error:
        raise _error(str(error), path, place_of) from error


def _error(text: str, path: Path, place_of: PlaceOf) -> ConfigError:
    file, line = place_of(path)
    return ConfigError(text, key=".".join(map(str, path)), file=file, line=line)
