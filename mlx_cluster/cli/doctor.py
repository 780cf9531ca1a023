"""``mlx-cluster doctor``: what this machine has, what it lacks and what to do about it.

Invariant: a check never raises; it ends as ok, a warning with its remedy, or a failure with its remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from mlx_cluster.cli.options import ConfigDir, load_config

Verdict = Literal["ok", "warning", "failed"]
MIN_FREE_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    verdict: Verdict
    text: str


def doctor(
    config: ConfigDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine: versions, BLAS, compiler, MPI, ports, memory. Exits 1 when something would not work."""
    findings = list(examine(config))
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.verdict == "failed" for finding in findings):
        raise typer.Exit(1)


def examine(config: Any = None) -> Iterator[Finding]:
    """All findings, in the order in which they are printed."""
    yield _python()
    yield from _packages()
    yield from _numeric()
    yield _mpi()
    yield _memory()
    yield from _ports(config)
    if sys.platform == "darwin":
        yield from _macos()


def _python() -> Finding:
    return Finding("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    from importlib import metadata

    for name in ("mlx", "mlx-lm", "grpcio"):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "failed", "not installed: pip install mlx-cluster brings it")


def _numeric() -> Iterator[Finding]:
    from mlx_cluster.stage.blas import find

    support = find()
    if not support.needed:
        yield Finding("BLAS", "ok", "mlx uses Metal and Accelerate")
        return
    advice = support.advice()
    openblas = [line for line in advice if "OpenBLAS" in line]
    compiler = [line for line in advice if "g++" in line]
    yield Finding("OpenBLAS", "warning" if openblas else "ok", openblas[0] if openblas else str(support.openblas))
    yield Finding("C++ compiler", "warning" if compiler else "ok", compiler[0] if compiler else str(support.compiler))


def _mpi() -> Finding:
    from mlx_cluster.cli.mpirun import find_mpirun

    mpirun = find_mpirun()
    if mpirun is None:
        return Finding("MPI", "ok", "not installed; only --transport mpi needs it (pip install 'mlx-cluster[mpi]')")
    return Finding("MPI", "ok", mpirun)


def _memory() -> Finding:
    from mlx_cluster.config.quantity import format_bytes
    from mlx_cluster.node.machine import free_bytes, total_bytes

    free, total = free_bytes(), total_bytes()
    text = f"{format_bytes(free)} of {format_bytes(total)} are free"
    if free < MIN_FREE_BYTES:
        return Finding("memory", "warning", f"{text}: enough for the demo, close other programs for larger models")
    return Finding("memory", "ok", text)


def _ports(config: Any) -> Iterator[Finding]:
    from mlx_cluster.cli.node import find_own_node
    from mlx_cluster.config.names import find_node, is_loopback
    from mlx_cluster.config.ports import is_free, plan_ports, uses
    from mlx_cluster.config.simulated import simulated_settings
    from mlx_cluster.errors import ConfigError

    try:
        settings = load_config(config).settings if config is not None else simulated_settings()
        planned = plan_ports(settings)
    except ConfigError as error:
        yield Finding("configuration", "failed", str(error))
        return
    try:
        import socket

        here = [find_node(settings, find_own_node(settings, None, socket.gethostname())).node_id]
    except ConfigError:
        here = [entry.node_id for entry in settings.cluster.nodes if is_loopback(entry.host)]
    if not here:
        yield Finding("ports", "warning", "no node of this configuration is this machine: nothing was checked")
        return
    taken = [use for use in uses(settings, planned, here) if not is_free(use.host, use.port)]
    if taken:
        names = ", ".join(f"{use.port} ({use.wanted_by})" for use in taken)
        yield Finding(
            "ports", "warning", f"taken: {names}; is a node running already? Else see --gateway-port and --base-port"
        )
    else:
        yield Finding("ports", "ok", "all free")


def _macos() -> Iterator[Finding]:
    """What a check cannot see but often bites."""
    yield Finding(
        "Local Network",
        "ok",
        "macOS 15 and newer: a Python that launchd or tmux started may get 'No route to host' while ping works; "
        "allow it in System Settings, Privacy & Security, Local Network",
    )
    yield Finding(
        "Thunderbolt",
        "ok",
        "three Macs cabled in a triangle: switch the Thunderbolt Bridge off (ifconfig bridge0 down), it would loop",
    )
    yield from _wired_limit()
    import os

    if os.environ.get("MLX_METAL_FAST_SYNCH"):
        yield Finding("MLX_METAL_FAST_SYNCH", "warning", "is set and can wedge the GPU until a reboot: unset it")
    if os.environ.get("GRPC_DNS_RESOLVER") not in (None, "native"):
        yield Finding("GRPC_DNS_RESOLVER", "warning", "gRPC's own resolver fails on .local names: set it to native")


def _wired_limit() -> Iterator[Finding]:
    import subprocess

    try:
        answer = subprocess.run(
            ["sysctl", "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, timeout=2.0, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return
    limit = answer.stdout.strip()
    text = "default: two thirds to three quarters of the memory" if limit == "0" else f"{limit} MB"
    yield Finding("GPU memory", "ok", f"{text}; raise it with sudo sysctl iogpu.wired_limit_mb=N")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": Text("ok", "green"), "warning": Text("warning", "yellow"), "failed": Text("failed", "red")}
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row(marks[finding.verdict], finding.what, Text(finding.text))
    Console().print(table)
