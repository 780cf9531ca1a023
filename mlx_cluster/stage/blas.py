"""What makes mlx fast, or work at all, on Linux CPUs: OpenBLAS to preload, and a compiler for fused kernels.

Owns: finding them and the environment of a stage process that follows from it. ``doctor`` prints the same findings.
Does not own: starting the process. Nothing here is needed on macOS, where mlx uses Metal and Accelerate.
Invariant: no path is assumed; what is returned exists and is built for this machine.

The wheel of mlx links the reference BLAS, one thread at 3 GFLOP/s; OpenBLAS is 10 to 50 times faster. Its symbols are
taken instead because a preloaded library comes first in the search order.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# libopenblas.so.0 (Debian), libopenblasp.so.0 (Fedora, threads), libopenblasp-r0.3.21.so; not the 64-bit-integer
# builds (libopenblas64), whose functions take other arguments under the same names.
_NAME = re.compile(r"libopenblas[pot]?(-r[\d.]+)?\.so(\.\d+)*$")
_ELF_HEADER_BYTES = 20


@dataclass(frozen=True, slots=True)
class NumericSupport:
    """What was found on this machine. Both fields are None where they do not matter (macOS)."""

    openblas: str | None
    compiler: str | None
    needed: bool

    def advice(self) -> list[str]:
        """What an operator should install, and what it brings; empty when nothing is missing."""
        lines: list[str] = []
        if self.needed and self.openblas is None:
            lines.append(
                "OpenBLAS is missing: matrix products on this CPU run 10 to 50 times slower than they could; "
                "install it (Debian and Ubuntu: libopenblas0-pthread, Fedora: openblas-threads)"
            )
        if self.needed and self.compiler is None:
            lines.append("g++ is missing: mlx cannot fuse kernels on this CPU and runs without; install g++")
        return lines


@functools.cache
def find() -> NumericSupport:
    """Look once per process."""
    if not sys.platform.startswith("linux"):
        return NumericSupport(None, None, needed=False)
    return NumericSupport(find_openblas(), shutil.which("g++"), needed=True)


def environment(support: NumericSupport, *, threads: int, preload: bool = True) -> dict[str, str]:
    """What a stage process gets on top of its agent's environment; ``preload=False`` leaves the BLAS as it is."""
    if not support.needed:
        return {}
    env = {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    if preload and support.openblas is not None:
        env["LD_PRELOAD"] = _joined(support.openblas, os.environ)
    if support.compiler is None:
        # mlx calls g++ for a fused kernel when one is first used, and fails there when there is none.
        env["MLX_DISABLE_COMPILE"] = "1"
    return env


def find_openblas() -> str | None:
    """The first usable OpenBLAS: builds with POSIX threads before others, the system's before this Python's."""
    return next((str(path) for path in _candidates() if _NAME.match(path.name) and _same_machine(path)), None)


def _candidates() -> Iterator[Path]:
    yield from _in_folders(
        ("/usr/lib/*/openblas-pthread", "/usr/lib*/openblas-pthread", "/usr/lib/*/openblas*", "/usr/lib/*/atlas*")
    )
    yield from _known_to_the_linker()
    yield from _in_folders(("/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/openblas/lib", f"{sys.prefix}/lib"))


def _in_folders(patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        for folder in sorted(Path("/").glob(pattern.lstrip("/"))):
            yield from sorted(folder.glob("libopenblas*.so*"))


def _known_to_the_linker() -> Iterator[Path]:
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if ldconfig is None:
        return
    try:
        listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in listing.splitlines():
        name, _, path = line.strip().partition(" => ")
        if "openblas" in name:
            yield Path(path)


def _same_machine(path: Path) -> bool:
    """Whether the library is built for the processor and word size of this interpreter."""
    try:
        return _elf_target(path) == _elf_target(Path(sys.executable))
    except OSError:
        return False


def _elf_target(path: Path) -> tuple[int, bytes] | None:
    with path.open("rb") as file:
        header = file.read(_ELF_HEADER_BYTES)
    if not header.startswith(b"\x7fELF"):
        return None
    return header[4], header[18:20]  # word size, machine


def _joined(library: str, env: Mapping[str, str]) -> str:
    already = env.get("LD_PRELOAD", "")
    return already if library in already.split(":") else ":".join(filter(None, (library, already)))
