"""Who says what about a setting, layer by layer, and who wins.

Owns: ``explain``. Invariant: a secret's value never leaves this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mlx_cluster.config import keys
from mlx_cluster.config.load import LayerName, Loaded, Origin
from mlx_cluster.errors import ConfigError

MASK = "********"


@dataclass(frozen=True, slots=True)
class Explanation:
    """``origins`` hold the defaults first; the last one wins."""

    key: str
    value: Any
    origins: tuple[Origin, ...]

    @property
    def winner(self) -> LayerName:
        return self.origins[-1].layer


def explain(loaded: Loaded, key: str) -> tuple[Explanation, ...]:
    """The setting ``key``, or every setting below it when it names a section. Raises ``ConfigError`` if unknown."""
    known = {path[:length] for path in loaded.provenance for length in range(1, len(path) + 1)}
    path = keys.path_of_key(type(loaded.settings), key, known)
    tree = loaded.settings.model_dump(mode="json")
    value: Any = tree
    for part in path:
        if not isinstance(value, dict) or part not in value:
            names = ", ".join(value) if isinstance(value, dict) and value else "none"
            raise ConfigError(f"{key!r} is not set: {keys.dotted(path[:1])} has {names}", key=key)
        value = value[part]
    below = [(p, v) for p, v in keys.leaves(tree, type(loaded.settings)) if p[: len(path)] == path]
    return tuple(_explanation(loaded, p, v) for p, v in below)


def _explanation(loaded: Loaded, path: keys.Path, value: Any) -> Explanation:
    schema = type(loaded.settings)
    origins = [Origin("defaults", _default(schema, path)), *loaded.provenance.get(path, ())]
    if keys.is_secret(schema, path):
        origins = [Origin(o.layer, MASK if o.value is not None else None, o.place) for o in origins]
        value = MASK if value is not None else None
    return Explanation(keys.dotted(path), value, tuple(origins))


def _default(schema: keys.Schema, path: keys.Path) -> Any:
    here: keys.Schema | None = schema
    is_mapping = False
    default: Any = None
    for part in path:
        if is_mapping:
            is_mapping = False
            default = None
            continue
        if here is None or part not in here.model_fields:
            return None
        info = here.model_fields[part]
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        here, is_mapping = keys.child_schema(info.annotation)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default
