"""The documentation's field tables are those that decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_cluster.gateway import field_docs, fields
from mlx_cluster.gateway.fields import Rule

PAGE = Path(__file__).resolve().parents[3] / "docs" / "api.md"


def test_the_page_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert field_docs.in_page(page) == page, "run: python -m mlx_cluster.gateway.field_docs docs/api.md"


def test_every_table_of_the_gateway_is_printed() -> None:
    tables = [value for name, value in vars(fields).items() if name[0].isalpha() and isinstance(value, dict)]
    assert len(tables) >= 6
    for table in tables:
        assert any(table is printed for printed in field_docs.DIALECTS.values())
    sections = field_docs.tables().split("### ")[1:]
    for section, table in zip(sections, field_docs.DIALECTS.values(), strict=True):
        for name in table:
            assert section.count(f"`{name}`") >= 1, name


def test_a_reason_says_which_values_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"echo": Rule("refused", "no | echo", (False, "")), "model": Rule("honoured")}
    monkeypatch.setattr(field_docs, "DIALECTS", {"POST /x": table})
    printed = field_docs.tables()
    assert "| `model` | honoured | |" in printed
    assert '| `echo` | refused | no \\| echo (accepted: `false`, `""`) |' in printed


def test_the_program_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    field_docs.main([])
    assert capsys.readouterr().out.strip() == field_docs.tables()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{field_docs.BEGIN}\nold\n{field_docs.END}\nafter\n")
    field_docs.main([str(page)])
    assert page.read_text() == f"before\n{field_docs.BEGIN}\n\n{field_docs.tables()}\n\n{field_docs.END}\nafter\n"
    with pytest.raises(ValueError, match="needs the lines"):
        field_docs.in_page("no marks")
