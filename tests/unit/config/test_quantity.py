"""Amounts of memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.config.quantity import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2.5GB", 2_500_000_000),
        ("2.2 gb", 2_200_000_000),
        ("12GiB", 12 * 1024**3),
        ("800M", 800_000_000),
        ("1kB", 1000),
        ("123", 123),
        (4096, 4096),
    ],
)
def test_amounts(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1,5GB", "1XB", "0", "0.1B", "1e9"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an amount|above zero"):
        parse_bytes(text)


@given(st.integers(1, 10**15))
def test_printed_amounts_are_near(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.06)
