"""How many bytes a stage on this node may use for the keys and values of its rows.

Owns: what ``runtime.kv_budget`` means. Does not own: what is done with the number (``engine.memory``).
Invariant: never more than what is free when the stage has loaded, less a reserve and the prefix cache's own bytes,
unless somebody names the bytes himself.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_cluster.config.quantity import parse_bytes
from mlx_cluster.node import machine

# For activations, graphs, and whoever else uses the machine.
_RESERVE_SHARE = 0.05
_MAX_RESERVE_BYTES = 1_000_000_000
# A prefix cache larger than half of what is there yields.
_PREFIX_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: what is free now, what the stage was given for weights and rows (None: no bound), what its weights took.

    ``wired_limit`` is what the GPU may hold in all, on a Mac.
    """

    total: int
    free: int
    granted: int | None
    weights: int
    wired_limit: int | None = None


def measured_room(granted: int | None, weights: int) -> Room:
    """This machine now, with a stage's weights in memory. May take a moment: call it in a thread."""
    return Room(machine.total_bytes(), machine.free_bytes(), granted, weights, machine.wired_limit_bytes())


def kv_budget(setting: str, room: Room, prefix_bytes: int) -> int:
    """Bytes for rows. ``setting`` is an amount, a fraction of what is there ("50%", "0.5"), or "auto" for all of it."""
    share = share_of(setting)
    if share is None:
        return parse_bytes(setting)
    bounds = [room.free]
    if room.granted is not None:
        bounds.append(room.granted - room.weights)
    if room.wired_limit is not None:
        bounds.append(room.wired_limit - room.weights)
    left = min(bounds) - min(_MAX_RESERVE_BYTES, int(_RESERVE_SHARE * room.total))
    left -= min(prefix_bytes, int(_PREFIX_SHARE * max(0, left)))
    return max(0, int(share * left))


def share_of(setting: str) -> float | None:
    """1 for "auto", the fraction where it is one, None for an amount of bytes."""
    text = setting.strip()
    if text == "auto":
        return 1.0
    if text.endswith("%"):
        return float(text[:-1]) / 100
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number <= 1 else None
