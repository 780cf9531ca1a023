"""The committed code in mlx_cluster/_pb is what the .proto files say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generator = runpy.run_path(str(ROOT / "proto" / "generate.py"))
    generator["generate"](tmp_path)
    for name in generator["NAMES"]:
        for suffix in ("_pb2.py", "_pb2.pyi"):
            file = f"mlx_cluster/_pb/{name}{suffix}"
            assert (tmp_path / file).read_text() == (ROOT / file).read_text(), f"{file} is stale: run make proto"
