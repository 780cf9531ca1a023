"""Steps of 1, 2, 4 … 32 rows through an idle pipeline: what t_s(b) looks like, before anybody asks for much.

Owns: which sizes are tried, for how long. Does not own: the curves (``engine.fill``), or when to stop for a client
(``engine.engine`` cancels it: whoever sends a request never waits for a measurement).
Invariant: it ends within its time, and leaves the choice of groups as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from mlx_cluster.engine.curves import FIRM_STEPS
from mlx_cluster.engine.fill import Fill
from mlx_cluster.request import Event, Sampling, SequenceRequest

SIZES = (1, 2, 4, 8, 16, 32)
_PROMPT = (1, 2, 3)
# The first step of a size may compile kernels, and rows may still be joining; the first token is no step.
_TOKENS = FIRM_STEPS + 3

Generate = Callable[[SequenceRequest], AsyncGenerator[Event]]


def request(model: str, tokens: int) -> SequenceRequest:
    """A generation that nobody reads: greedy, from a prompt that every vocabulary has."""
    return SequenceRequest("canary", model, _PROMPT, tokens, Sampling(temperature=0.0), speculate=False)


async def rehearse(generate: Generate, model: str, fill: Fill, *, max_rows: int, seconds: float) -> None:
    """Time one group of each size in turn, as far as ``seconds`` go. Cancel it when there is real work."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + seconds
    fill.pinned = 1
    try:
        for rows in SIZES:
            began = loop.time()
            if rows > max_rows:
                return
            async with asyncio.TaskGroup() as group:
                for _ in range(rows):
                    group.create_task(_run(generate(request(model, _TOKENS))))
            # Twice the rows take twice the time at worst.
            if ends_at - loop.time() < 2 * (loop.time() - began):
                return
    finally:
        fill.pinned = None


async def _run(events: AsyncGenerator[Event]) -> None:
    async with contextlib.aclosing(events):
        async for _ in events:
            pass
