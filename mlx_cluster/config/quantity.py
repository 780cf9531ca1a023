"""Amounts of memory as people write them.

Owns: ``parse_bytes`` and ``format_bytes``. Decimal units are powers of 1000, ``KiB`` and its like powers of 1024.
"""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{tail}": 1000**power for power, letter in enumerate("KMGT", 1) for tail in ("", "B")}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``"2.5GB"`` → 2_500_000_000. Raises ``ValueError`` on anything that is not an amount above zero."""
    match = _AMOUNT.fullmatch(str(text))
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 2.5GB, 12GiB or 800MB")
    num_bytes = round(float(match[1]) * factor)
    if num_bytes < 1:
        raise ValueError(f"{text!r} must be above zero")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """``2_500_000_000`` → ``2.5 GB``; bytes below 1000 are exact."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.95:
            return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
