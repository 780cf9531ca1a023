"""What this machine is: memory, cores, versions. Read without mlx and without third parties.

Owns: the numbers a node reports of its machine. Does not own: what is made of them (placement).
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx_cluster

_MEMINFO = Path("/proc/meminfo")
_CUDA_WHEELS = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
_VM_STAT_SECONDS = 2.0
# macOS lets the GPU have two thirds of a small machine's memory and three quarters of a large one's.
_DEFAULT_WIRED_SHARE = 0.66
_JACCL_MACOS = (26, 2)


def total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes() -> int:
    """What new processes may take now without swapping."""
    if sys.platform == "darwin":
        return _free_on_macos()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE) if _MEMINFO.exists() else None
    return int(found[1]) * 1024 if found else total_bytes() // 2


def _free_on_macos() -> int:
    """Free, inactive, speculative and purgeable pages: what macOS hands out before it swaps."""
    try:
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=_VM_STAT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return total_bytes() // 2
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE)
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def wired_limit_bytes() -> int | None:
    """What the GPU of a Mac may hold; None elsewhere. ``iogpu.wired_limit_mb`` is 0 until somebody sets it."""
    if sys.platform != "darwin":
        return None
    try:
        text = subprocess.run(
            ["sysctl", "-n", "iogpu.wired_limit_mb"],
            capture_output=True,
            text=True,
            timeout=_VM_STAT_SECONDS,
            check=True,
        ).stdout
        limit = int(text) * 1024 * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        limit = 0
    return limit or int(_DEFAULT_WIRED_SHARE * total_bytes())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def load() -> float:
    """Runnable processes of the last minute for each core, 0…1 (1: every core has had something to do)."""
    return round(min(1.0, os.getloadavg()[0] / cores()), 1)


def name() -> str:
    """The same for every node on one machine."""
    return platform.node() or "unknown"


def has_gpu() -> bool:
    """Whether mlx would find a GPU here, as far as can be told without importing it."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return any(_version(wheel) for wheel in _CUDA_WHEELS)


def transports() -> tuple[str, ...]:
    """Kinds of links that can be brought up here, when somebody asks for them by name; mpi depends on mpirun."""
    kinds = ["grpc", "ring"]
    if sys.platform == "darwin":
        release = tuple(int(part) for part in platform.mac_ver()[0].split(".")[:2] if part.isdigit())
        kinds += ["jaccl"] if has_gpu() and release >= _JACCL_MACOS else []
    elif has_gpu():
        kinds.append("nccl")
    return tuple(kinds)


def versions() -> str:
    """What must be equal on all nodes of a cluster."""
    return f"mlx-cluster {mlx_cluster.__version__}, mlx {_version('mlx')}, mlx-lm {_version('mlx-lm')}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
