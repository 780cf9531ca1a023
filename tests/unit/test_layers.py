"""The layer table of docs/design.md, enforced: who may import whom inside mlx_cluster, and which third parties."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mlx_cluster"

# unit → units it may import besides itself
FACTS = {"errors", "config", "plan", "request", "grammar", "microbatch", "log", "metrics", "wire", "_pb", "lifeline"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_pb": set(),
    "plan": {"errors"},
    "request": {"errors"},
    "grammar": {"errors", "request"},
    "microbatch": {"errors", "request"},
    "config": {"errors", "plan"},
    "log": {"errors", "config"},
    "metrics": {"errors", "config", "log"},
    "wire": {"errors", "_pb", "request", "microbatch", "plan"},
    "lifeline": {"errors", "log"},
    "model": FACTS,
    "transport": FACTS,
    "cluster": FACTS,
    "tokenizer": FACTS,
    "security": FACTS,
    "stage": FACTS | {"model", "transport"},
    "engine": FACTS | {"transport"},
    "gateway": FACTS | {"tokenizer", "security"},
    "demo": FACTS | {"tokenizer"},
    "node": FACTS | {"model", "transport", "cluster", "tokenizer", "security", "stage", "engine", "gateway", "demo"},
    "cli": FACTS
    | {"model", "transport", "cluster", "tokenizer", "security", "stage", "engine", "gateway", "demo", "node"},
}
# third party → files (relative to the package) that may import it; a folder ends with "/"
EDGES: dict[str, tuple[str, ...]] = {
    "mlx": ("model/", "transport/mlx_link.py", "demo/"),
    "mlx_lm": ("model/", "tokenizer/", "demo/"),
    "grpc": (
        "transport/grpc_link.py",
        "cluster/rpc.py",
        "cluster/weights.py",
        "cluster/post.py",
        "stage/service.py",
        "engine/stages.py",
        "engine/remote.py",
        "node/",
    ),
    "fastapi": ("gateway/", "node/"),
    "starlette": ("gateway/", "node/"),
    "uvicorn": ("gateway/", "node/"),
    "transformers": ("tokenizer/", "demo/"),
    "tokenizers": ("tokenizer/", "demo/"),
    "typer": ("cli/",),
    "rich": ("cli/", "model/hub.py"),
    "zeroconf": ("node/discovery.py",),
    "ifaddr": ("node/discovery.py",),
    "huggingface_hub": ("model/hub.py",),
    "mpi4py": ("node/mpi.py",),
    "llguidance": ("grammar.py", "model/grammar.py"),
}


def imports_of(path: Path) -> list[str]:
    """Absolute module names that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names.append(node.module or "")
            if node.module == "mlx_cluster":
                names += [f"mlx_cluster.{alias.name}" for alias in node.names]
    return names


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if "_pb" not in p.parts and p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_layer_allows(path: Path) -> None:
    unit = unit_of(path)
    if unit in ("__main__",):
        return
    allowed = ALLOWED[unit] | {unit}
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "mlx_cluster" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in allowed, f"{path.name} ({unit}) imports {name}"
        if parts[0] in EDGES:
            relative = str(path.relative_to(PACKAGE))
            homes = EDGES[parts[0]]
            assert any(relative == h or (h.endswith("/") and relative.startswith(h)) for h in homes), (
                f"{relative} imports {name}; {parts[0]} lives behind {homes}"
            )


def test_the_table_has_no_cycle() -> None:
    state: dict[str, int] = {}

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        assert state.get(unit) != 1, f"cycle: {' → '.join((*trail, unit))}"
        if state.get(unit) == 2:
            return
        state[unit] = 1
        for child in ALLOWED[unit]:
            visit(child, (*trail, unit))
        state[unit] = 2

    for unit in ALLOWED:
        visit(unit, ())
