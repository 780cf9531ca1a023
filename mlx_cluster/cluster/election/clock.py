"""The clock that promises and leases are counted on.

``time.monotonic`` stands still while a machine sleeps: a leader that slept would believe in a lease that others have
long forgotten. This one runs on.
"""

from __future__ import annotations

import sys
import time


def now() -> float:
    """Seconds since some fixed moment of this boot, asleep or awake."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.clock_gettime(time.CLOCK_MONOTONIC)  # on macOS this one runs on during sleep
