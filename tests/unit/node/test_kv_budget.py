"""What ``runtime.kv_budget`` comes to."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mlx_cluster.config.schema import RuntimeSection
from mlx_cluster.node.kv_budget import Room, kv_budget, measured_room

GB = 1_000_000_000
ROOM = Room(total=16 * GB, free=9 * GB, granted=None, weights=3 * GB)


@pytest.mark.parametrize(
    ("setting", "room", "expected"),
    [
        ("4GB", ROOM, 4 * GB),
        ("4000000000", ROOM, 4 * GB),
        ("auto", ROOM, 9 * GB - 16 * GB // 20 - GB),
        ("50%", ROOM, (9 * GB - 16 * GB // 20 - GB) // 2),
        ("0.5", ROOM, (9 * GB - 16 * GB // 20 - GB) // 2),
        ("auto", Room(16 * GB, 9 * GB, 5 * GB, 3 * GB), 2 * GB - 16 * GB // 20 - 600_000_000),
        ("auto", Room(16 * GB, 9 * GB, None, 3 * GB, wired_limit=8 * GB), 5 * GB - 16 * GB // 20 - GB),
        ("auto", Room(64 * GB, 40 * GB, None, 3 * GB), 40 * GB - GB - GB),
        ("auto", Room(16 * GB, 100_000_000, None, 3 * GB), 0),
    ],
)
def test_the_tightest_bound_less_a_reserve_and_the_prefix_cache(setting: str, room: Room, expected: int) -> None:
    assert kv_budget(setting, room, prefix_bytes=GB) == expected


def test_this_machine_has_some() -> None:
    assert kv_budget("auto", measured_room(None, 0), 0) > 0


@pytest.mark.parametrize("value", ["auto", "50%", 0.5, "0.25", "12GB", 4_000_000_000, 1.0])
def test_settings_that_are_good(value: object) -> None:
    assert RuntimeSection(kv_budget=value).kv_budget  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["most", "0%", "150%", 0, "", 0.0])
def test_settings_that_are_not(value: object) -> None:
    with pytest.raises(ValidationError):
        RuntimeSection(kv_budget=value)  # type: ignore[arg-type]
