"""What a stage process gets in its environment, from what was found; and the look-up on folders made for the test."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from mlx_cluster.stage import blas
from mlx_cluster.stage.blas import NumericSupport

FOUND = NumericSupport("/lib/libopenblas.so.0", "/bin/g++", needed=True)
NOTHING = NumericSupport(None, None, needed=True)
MACOS = NumericSupport(None, None, needed=False)


def test_openblas_is_preloaded_with_bounded_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert blas.environment(FOUND, threads=2) == {
        "LD_PRELOAD": "/lib/libopenblas.so.0",
        "OPENBLAS_NUM_THREADS": "2",
        "OMP_NUM_THREADS": "2",
    }


@pytest.mark.parametrize(
    ("already", "expected"),
    [("/x.so", "/lib/libopenblas.so.0:/x.so"), ("/x.so:/lib/libopenblas.so.0", "/x.so:/lib/libopenblas.so.0")],
)
def test_what_is_preloaded_already_stays(monkeypatch: pytest.MonkeyPatch, already: str, expected: str) -> None:
    monkeypatch.setenv("LD_PRELOAD", already)
    assert blas.environment(FOUND, threads=1)["LD_PRELOAD"] == expected


def test_without_a_compiler_mlx_fuses_nothing() -> None:
    env = blas.environment(NOTHING, threads=1)
    assert env["MLX_DISABLE_COMPILE"] == "1"
    assert "LD_PRELOAD" not in env


def test_preloading_can_be_switched_off_and_macos_needs_none_of_it() -> None:
    assert "LD_PRELOAD" not in blas.environment(FOUND, threads=1, preload=False)
    assert blas.environment(MACOS, threads=1) == {}


def test_advice_names_what_to_install() -> None:
    assert FOUND.advice() == MACOS.advice() == []
    first, second = NOTHING.advice()
    assert "libopenblas0-pthread" in first
    assert "g++" in second


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared objects of Linux")
def test_only_a_library_of_this_machine_with_ordinary_integers_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elf = Path(sys.executable).resolve()
    foreign = tmp_path / "libopenblas.so.0"
    foreign.write_bytes(b"\x7fELF" + bytes(16))
    script = tmp_path / "libopenblas.so"
    script.write_text("INPUT(-lopenblas)")
    wide = tmp_path / "libopenblas64.so.0"
    shutil.copy(elf, wide)
    monkeypatch.setattr(blas, "_candidates", lambda: iter((foreign, script, wide, tmp_path / "libopenblas.so.9")))
    assert blas.find_openblas() is None
    good = tmp_path / "libopenblasp-r0.3.21.so"
    shutil.copy(elf, good)
    monkeypatch.setattr(blas, "_candidates", lambda: iter((foreign, script, wide, good)))
    assert blas.find_openblas() == str(good)


def test_what_is_found_on_this_machine_exists() -> None:
    support = blas.find()
    assert support.openblas is None or Path(support.openblas).exists()
    assert support.needed == sys.platform.startswith("linux")
