"""The node's speed, measured once at join in a process of its own.

Owns: when it is measured, and the process. Does not own: the measurement (``model.speed``), its use (``placer``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from mlx_cluster import log
from mlx_cluster.config.names import is_loopback
from mlx_cluster.config.schema import Settings

TIMEOUT_SECONDS = 30.0  # mostly for the import of mlx on a machine that has just started

_log = log.get(__name__)


async def measure_speed(settings: Settings) -> float:
    """Bytes of weights that this machine reads per second; 0 where it is not measured or cannot be.

    ``runtime.measure_speed: auto`` leaves it out while all nodes share this machine: they are equal, and would disturb
    each other's measurement.
    """
    wish = settings.runtime.measure_speed
    if wish == "never" or (wish == "auto" and all(is_loopback(node.host) for node in settings.cluster.nodes)):
        return 0.0
    command = [sys.executable, "-m", "mlx_cluster.model.speed", "--device", settings.runtime.device]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": str(settings.runtime.threads)},
    )
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            out, err = await process.communicate()
        speed = float(out)
    except (TimeoutError, ValueError) as error:
        words = err.decode(errors="replace").strip().rpartition("\n")[2] if isinstance(error, ValueError) else ""
        _log.warning("this machine's speed is not known", reason=words or repr(error))
        return 0.0
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    _log.info("speed measured", bytes_per_second=round(speed))
    return speed
