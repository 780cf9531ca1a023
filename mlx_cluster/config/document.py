"""YAML with memory: values, and the line on which each key and value stands.

Owns: reading one document safely. Duplicate keys, anchors and tags are errors. ``on``, ``off``, ``yes`` and ``no`` are
words here, as in YAML 1.2: a setting may be called ``off``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_cluster.config.names import did_you_mean
from mlx_cluster.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class keeps it as a mutable class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


@dataclass(slots=True)
class Document:
    """``lines`` maps a path (keys, and indices of lists) to its line, counted from 1."""

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)


def read_document(path: Path, sections: tuple[str, ...] | None = None) -> Document:
    """Read one file. ``sections`` are the top-level keys that may stand in it (None: any)."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES} bytes: this is not a configuration file", file=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error
    document = parse_document(text, str(path))
    for key in document.tree:
        if sections is not None and key not in sections:
            raise ConfigError(
                f"section {key!r} does not belong here{did_you_mean(key, sections)}: this file holds "
                f"{' and '.join(sections)}, everything else stands in cluster.yaml",
                key=key,
                file=str(path),
                line=document.lines[(key,)],
            )
    return document


def parse_document(text: str, file: str) -> Document:
    loader = _Loader(text)
    document = Document(file)
    try:
        node = loader.get_single_node()
        if node is not None:
            value = _build(loader, node, (), document, set())
            if not isinstance(value, dict):
                raise ConfigError("the file must hold sections such as 'cluster:'", file=file, line=1)
            document.tree = {key: {} if entry is None else entry for key, entry in value.items()}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            f"not valid YAML: {error.problem or error.context}", file=file, line=mark.line + 1 if mark else None
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {error}", file=file) from error
    finally:
        loader.dispose()
    return document


def parse_value(text: str, file: str) -> Any:
    """One value as it would stand in a file: ``"9000"`` → 9000, ``"[a, b]"`` → a list, ``""`` → an empty string."""
    try:
        return parse_document(f"value: {text}", file).tree["value"] if text.strip() else ""
    except ConfigError:
        return text  # such as "a: b": a plain string that only looks like YAML


def _build(loader: Any, node: yaml.Node, path: tuple[str | int, ...], document: Document, seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in seen:
        raise ConfigError("anchors and aliases are not supported: write the value out", file=document.file, line=line)
    seen.add(id(node))
    document.lines.setdefault(path, line)
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
        raise ConfigError(f"the tag {node.tag} is not supported: write a plain value", file=document.file, line=line)
    match node:
        case yaml.MappingNode():
            return _build_mapping(loader, node, path, document, seen)
        case yaml.SequenceNode():
            return [_build(loader, item, (*path, i), document, seen) for i, item in enumerate(node.value)]
        case _:
            return loader.construct_object(node)


def _build_mapping(
    loader: Any, node: yaml.MappingNode, path: tuple[str | int, ...], document: Document, seen: set[int]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        raw = loader.construct_object(key_node, deep=True)
        if isinstance(raw, bool) or not isinstance(raw, Hashable) or not isinstance(raw, str | int):
            raise ConfigError(f"{raw!r} cannot be a key", file=document.file, line=line)
        key = str(raw)
        if key in result:
            first = document.lines[(*path, key)]
            raise ConfigError(
                f"{'.'.join(map(str, (*path, key)))} stands here and on line {first}: remove one of them",
                key=key,
                file=document.file,
                line=line,
            )
        document.lines[(*path, key)] = line
        result[key] = _build(loader, value_node, (*path, key), document, seen)
    return result
