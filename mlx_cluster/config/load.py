"""From files, environment and command line to one frozen ``Settings``.

Owns: the layers and their order (later wins): built-in defaults < files < environment < runtime < manual.
Does not own: what a setting means (``config.schema``) or how sections must agree (``config.check``).
Invariant: a ``Loaded`` is valid, and its provenance names every layer that said something about a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mlx_cluster.config import keys
from mlx_cluster.config.check import check
from mlx_cluster.config.document import Document, parse_value, read_document
from mlx_cluster.config.names import did_you_mean
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError

LayerName = Literal["defaults", "files", "environment", "runtime", "manual"]
LAYERS: tuple[LayerName, ...] = ("defaults", "files", "environment", "runtime", "manual")
ENVIRONMENT_PREFIX = "MLX_CLUSTER__"
# Which sections may stand in which file; cluster.yaml may hold any, and must be there.
FILES: dict[str, tuple[str, ...] | None] = {
    "cluster.yaml": None,
    "nodes.yaml": ("nodes",),
    "models.yaml": ("models",),
    "network.yaml": ("network",),
}
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Origin:
    """What one layer says about a key. ``place`` is file:line, the variable's name, or what else gave it."""

    layer: LayerName
    value: Any
    place: str = ""


Provenance = Mapping[keys.Path, tuple[Origin, ...]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """``provenance`` maps a path to what the layers above the defaults say, the lowest first."""

    settings: Settings
    provenance: Provenance
    config_dir: Path | None = None


@dataclass(slots=True)
class Layer:
    """One layer as a tree, and where each of its paths stands: (file or source, line or None)."""

    name: LayerName
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str | int, ...], tuple[str, int | None]] = field(default_factory=dict)


def load(
    config_dir: Path | str | None,
    *,
    environ: Mapping[str, str] | None = None,
    manual: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read the directory and lay the other layers over it. Raises ``ConfigError`` with file, line and a suggestion.

    ``runtime`` and ``manual`` map dotted keys to values (``{"api_gateway.port": 9000}``); a value may be a mapping.
    ``config_dir`` None means no files: the built-in defaults and the layers above them.
    """
    directory = Path(config_dir) if config_dir is not None else None
    files = read_files(directory) if directory is not None else Layer("files")
    known = frozenset(_named_entries(files.tree))
    layers = [
        files,
        environment_layer(Settings, environ or {}, known),
        written_layer("runtime", Settings, runtime or {}, known),
        written_layer("manual", Settings, manual or {}, known),
    ]
    settings = build(Settings, layers)
    check(settings, lambda path: place_of(path, layers))
    return Loaded(settings, provenance_of(Settings, layers), directory)


# -- the layers -----------------------------------------------------------------------------------


def read_files(directory: Path) -> Layer:
    """The files layer. A key that stands in two files is an error: neither would visibly win."""
    if not (directory / "cluster.yaml").is_file():
        raise ConfigError(
            f"{directory / 'cluster.yaml'} is missing: --config names a directory that holds cluster.yaml", key="config"
        )
    layer = Layer("files")
    for name, sections in FILES.items():
        if (directory / name).is_file():
            document = read_document(directory / name, sections)
            _merge_disjoint(layer, layer.tree, document.tree, document, ())
            layer.places |= {path: (document.file, line) for path, line in document.lines.items() if path}
    return layer


def _merge_disjoint(
    layer: Layer, into: dict[str, Any], tree: Mapping[str, Any], document: Document, above: keys.Path
) -> None:
    for key, value in tree.items():
        path = (*above, key)
        if key not in into:
            into[key] = value
        elif isinstance(into[key], dict) and isinstance(value, dict):
            _merge_disjoint(layer, into[key], value, document, path)
        else:
            file, line = layer.places[path]
            raise ConfigError(
                f"{keys.dotted(path)} stands here and in {file}:{line}: remove one of them",
                key=keys.dotted(path),
                file=document.file,
                line=document.lines[path],
            )


def environment_layer(schema: keys.Schema, environ: Mapping[str, str], known: keys.KnownNames) -> Layer:
    """``MLX_CLUSTER__API_GATEWAY__PORT=9000``; with ``_FILE`` at its end the value is the content of that file."""
    layer = Layer("environment")
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        parts = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        text = environ[variable]
        try:
            path, value = keys.path_of_variable(schema, parts, known, variable), parse_value(text, variable)
        except ConfigError:
            if not parts[-1].endswith("_file"):
                raise
            plain = [*parts[:-1], parts[-1].removesuffix("_file")]
            path, value = keys.path_of_variable(schema, plain, known, variable), _content(text, variable)
        _put(layer, path, value, (variable, None))
    return layer


def _content(file: str, variable: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{variable} names a file that cannot be read: {error}", file="environment") from error


def written_layer(name: LayerName, schema: keys.Schema, values: Mapping[str, Any], known: keys.KnownNames) -> Layer:
    """Runtime and manual: dotted keys."""
    layer = Layer(name)
    source = "command line" if name == "manual" else name
    for key, value in values.items():
        path = keys.path_of_key(schema, key, known)
        _put(layer, path, value, (f"{source} {key}", None))
        for leaf, _ in keys.leaves(layer.tree, schema):
            if leaf[: len(path)] == path:
                layer.places[leaf] = (f"{source} {keys.dotted(leaf)}", None)
    return layer


def _put(layer: Layer, path: keys.Path, value: Any, place: tuple[str, int | None]) -> None:
    here = layer.tree
    for part in path[:-1]:
        here = here.setdefault(part, {})
    here[path[-1]] = value
    layer.places[path] = place


# -- one tree -------------------------------------------------------------------------------------


def build(schema: type[S], layers: list[Layer]) -> S:
    """Merge and validate. The error names the place of the value that won."""
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _overlay(tree, layer.tree)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _explain(schema, error.errors(), layers) from error


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and value is None:
            del merged[key]  # "nothing" takes back what lower layers said of a section
        elif isinstance(value, Mapping):
            merged[key] = _overlay(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def _explain(schema: keys.Schema, problems: list[ErrorDetails], layers: list[Layer]) -> ConfigError:
    problem = problems[0]
    path = problem["loc"]
    place = place_of(path, layers)
    key = keys.dotted(path)
    match problem["type"]:
        case "extra_forbidden":
            siblings = _fields_at(schema, path[:-1])
            text = f"unknown key {key!r}{did_you_mean(str(path[-1]), siblings)}"
            if siblings and not did_you_mean(str(path[-1]), siblings):
                text += f"; known here: {', '.join(siblings)}"
        case "value_error":
            text = f"{key}: {problem['ctx']['error']}"
        case kind:
            shown = "" if keys.is_secret(schema, _strings(path)) or kind == "missing" else f", not {problem['input']!r}"
            expected = problem["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
            hint = ""
            if kind == "literal_error" and isinstance(problem["input"], str):
                hint = did_you_mean(
                    problem["input"], problem["ctx"]["expected"].replace("'", "").split(" or ")[0].split(", ")
                )
            text = f"{key} {expected}{shown}{hint}"
    if len(problems) > 1:
        text += f" (and {len(problems) - 1} more)"
    return ConfigError(text, key=key, file=place[0], line=place[1])


def _strings(path: tuple[int | str, ...]) -> keys.Path:
    return tuple(str(part) for part in path)


def _fields_at(schema: keys.Schema, path: tuple[int | str, ...]) -> list[str]:
    here: keys.Schema | None = schema
    is_mapping = False
    for part in path:
        if is_mapping or isinstance(part, int):
            is_mapping = False
            continue
        if here is None or part not in here.model_fields:
            return []
        annotation = here.model_fields[part].annotation
        here, is_mapping = keys.child_schema(annotation)
        if here is None:
            here = next((a for a in _arguments(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return list(here.model_fields) if here is not None else []


def _arguments(annotation: Any) -> Iterator[Any]:
    for argument in getattr(annotation, "__args__", ()):
        yield argument
        yield from _arguments(argument)


def place_of(path: tuple[int | str, ...], layers: list[Layer]) -> tuple[str | None, int | None]:
    """Where the winning value at ``path`` stands: the longest part of the path that the highest layer knows."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if path[:length] in layer.places:
                return layer.places[path[:length]]
    return None, None


def provenance_of(schema: keys.Schema, layers: list[Layer]) -> dict[keys.Path, tuple[Origin, ...]]:
    found: dict[keys.Path, tuple[Origin, ...]] = {}
    for layer in layers:
        for path, value in keys.leaves(layer.tree, schema):
            file, line = place_of(path, [layer])
            place = f"{file}:{line}" if line is not None else (file or "")
            found[path] = (*found.get(path, ()), Origin(layer.name, value, place))
    return found


def _named_entries(tree: Mapping[str, Any]) -> Iterator[keys.Path]:
    for section in ("nodes", "models"):
        entries = tree.get(section)
        if isinstance(entries, Mapping):
            for name, entry in entries.items():
                yield (section, name)
                shards = entry.get("sharding") if isinstance(entry, Mapping) else None
                for shard in shards if isinstance(shards, Mapping) else ():
                    yield (section, name, "sharding", shard)
