"""The command as a person meets it: exit codes, one-line errors, a light start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_cluster import __version__
from mlx_cluster.cli.app import app
from mlx_cluster.cli.node import find_own_node
from mlx_cluster.cli.options import parse_assignments
from mlx_cluster.cli.plan import budgets
from mlx_cluster.config.load import load
from mlx_cluster.config.simulated import simulated_settings
from mlx_cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("mlx", "mlx_lm", "transformers", "grpc", "fastapi", "uvicorn", "rich.table", "yaml", "pydantic", "httpx")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_cluster", *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def test_an_error_is_one_line_and_exit_2() -> None:
    done = command("config", "explain", "api_gateway.prot")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "mlx-cluster: unknown key 'api_gateway.prot': api_gateway has no 'prot' (did you mean 'port'?)\n"
    )


def test_the_start_is_light() -> None:
    code = f"import sys, mlx_cluster.cli.app; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_version() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert (result.exit_code, result.output) == (0, f"mlx-cluster {__version__}\n")


def test_explain_shows_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CLUSTER__API_GATEWAY__PORT", "9001")
    arguments = [
        "config",
        "explain",
        "api_gateway.port",
        "--config",
        str(ROOT / "config"),
        "--set",
        "api_gateway.port=9002",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == ["api_gateway.port", "=", "9002", "(from", "manual)"]
    assert [line[-3:-1] if len(line) > 3 else line[:2] for line in lines[1:]]
    assert [next(word for word in line if word.isdigit()) for line in lines[1:]] == ["8000", "8000", "9001", "9002"]
    assert lines[-1][0] == "→"


def test_assignments_are_read_like_yaml() -> None:
    assert parse_assignments(["a=1", "b=off", "c=[x, y]", "d=k=v", "e="]) == {
        "a": 1,
        "b": "off",
        "c": ["x", "y"],
        "d": "k=v",
        "e": "",
    }
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        parse_assignments(["a"])


def test_a_node_finds_itself() -> None:
    settings = load(ROOT / "config").settings
    assert find_own_node(settings, "node_1", "x") == "mini2"
    assert find_own_node(settings, None, "Master.local") == "master"
    with pytest.raises(ConfigError, match=r"called 'laptop' and no node is: say --id; .* mini1, mini2, master"):
        find_own_node(settings, None, "laptop.local")


def test_node_needs_a_configuration() -> None:
    with pytest.raises(ConfigError, match="--config is missing"):
        CliRunner().invoke(app, ["node", "--id", "0"], catch_exceptions=False)


def test_budgets_come_from_nodes_yaml_else_from_this_machine() -> None:
    assert [b.budget_bytes for b in budgets(load(ROOT / "config").settings)] == [12 * 10**9, 12 * 10**9, 24 * 10**9]
    shares = [b.budget_bytes or 0 for b in budgets(simulated_settings(2))]
    assert all(share > 0 for share in shares)


def test_status_without_a_cluster_says_what_to_do() -> None:
    done = command("status", "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "start one with 'mlx-cluster up'" in done.stderr
