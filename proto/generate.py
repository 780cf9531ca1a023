"""Writes mlx_cluster/_pb from the .proto files: ``python proto/generate.py [TARGET_FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
NAMES = ("stage", "engine", "cluster", "weights")


def generate(target: Path) -> None:
    """Generate message modules and their type stubs below ``target``; raises RuntimeError when protoc refuses."""
    files = [f"mlx_cluster/_pb/{name}.proto" for name in NAMES]
    status = protoc.main(["protoc", f"-I{HERE}", f"--python_out={target}", f"--pyi_out={target}", *files])
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent)
