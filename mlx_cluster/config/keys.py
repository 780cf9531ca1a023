"""Dotted keys and the schema: which path a written key means, and what is known at a place.

Owns: the walk over the pydantic sections. Names of models hold dots (``models.qwen2.5-7b.split``), so a key is cut with
the schema in hand, never by its dots alone.
"""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

from mlx_cluster.config.names import did_you_mean
from mlx_cluster.errors import ConfigError

Path = tuple[str, ...]
Schema = type[BaseModel]
# Paths of entries whose names the files already gave (("models", "demo")); a written key prefers them.
KnownNames = Collection[Path]


def child_schema(annotation: Any) -> tuple[Schema | None, bool]:
    """(section type below this annotation, whether it is a mapping of named entries)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return (value if isinstance(value, type) and issubclass(value, BaseModel) else None), True
    return None, False


def path_of_key(schema: Schema, key: str, known: KnownNames = ()) -> Path:
    """``"models.qwen2.5-7b.split"`` → ``("models", "qwen2.5-7b", "split")``. Raises ``ConfigError`` if unknown."""
    return _walk(schema, key.split("."), (), known, key)


def _walk(schema: Schema, parts: list[str], done: Path, known: KnownNames, key: str) -> Path:
    head, rest = parts[0], parts[1:]
    if head not in schema.model_fields:
        where = ".".join(done) or "the top level"
        raise ConfigError(
            f"unknown key {key!r}: {where} has no {head!r}{did_you_mean(head, schema.model_fields)}", key=key
        )
    path = (*done, head)
    if not rest:
        return path
    child, is_mapping = child_schema(schema.model_fields[head].annotation)
    if child is None:
        raise ConfigError(f"unknown key {key!r}: {'.'.join(path)} is a single value", key=key)
    if not is_mapping:
        return _walk(child, rest, path, known, key)
    cut = _length_of_name(child, rest, path, known)
    path = (*path, ".".join(rest[:cut]))
    return _walk(child, rest[cut:], path, known, key) if rest[cut:] else path


def _length_of_name(entry: Schema, parts: list[str], above: Path, known: KnownNames) -> int:
    for cut in range(len(parts), 0, -1):
        if (*above, ".".join(parts[:cut])) in known:
            return cut
    for cut in range(1, len(parts)):
        if parts[cut] in entry.model_fields:
            return cut
    return len(parts)


def path_of_variable(schema: Schema, parts: list[str], known: KnownNames, variable: str) -> Path:
    """``["api_gateway", "port"]`` → the path; a name such as ``qwen2.5-7b`` is written ``QWEN2_5_7B``."""
    path: Path = ()
    here: Schema | None = schema
    is_mapping = False
    for part in parts:
        if is_mapping:
            path = (*path, _known_name(part, path, known))
            is_mapping = False
            continue
        if here is None or part not in here.model_fields:
            where = ".".join(path) or "the top level"
            fields = here.model_fields if here is not None else {}
            hint = did_you_mean(part, fields)
            raise ConfigError(f"{variable} sets no known key: {where} has no {part!r}{hint}", file="environment")
        path = (*path, part)
        here, is_mapping = child_schema(here.model_fields[part].annotation)
    return path


def _known_name(part: str, above: Path, known: KnownNames) -> str:
    for path in known:
        if path[:-1] == above and re.sub(r"[^a-z0-9]", "_", path[-1].lower()) == part:
            return path[-1]
    return part


def is_secret(schema: Schema, path: Path) -> bool:
    """Whether the value at this path must never be printed: its type is ``SecretStr``."""
    here: Schema | None = schema
    annotation: Any = None
    is_mapping = False
    for part in path:
        if is_mapping:
            is_mapping = False
            continue
        if here is None or part not in here.model_fields:
            return False
        annotation = here.model_fields[part].annotation
        here, is_mapping = child_schema(annotation)
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return SecretStr in options


def leaves(tree: Mapping[str, Any], schema: Schema, above: Path = ()) -> list[tuple[Path, Any]]:
    """Every (path, value) below ``tree`` that the schema does not divide further. Lists are single values."""
    found: list[tuple[Path, Any]] = []
    for key, value in tree.items():
        path = (*above, key)
        field = schema.model_fields.get(key)
        child, is_mapping = child_schema(field.annotation) if field is not None else (None, False)
        if child is None or not isinstance(value, Mapping):
            found.append((path, value))
        elif is_mapping:
            for name, entry in value.items():
                if isinstance(entry, Mapping) and entry:
                    found += leaves(entry, child, (*path, name))
                else:
                    found.append(((*path, name), entry))
        else:
            found += leaves(value, child, path)
    return found


def dotted(path: Collection[str | int]) -> str:
    return ".".join(map(str, path))
