"""The pipelines that this node drives, because their stage 0 is here.

Owns: one driver and its task per pipeline. Does not own: which plans are in force, how a driver works (``bringup``).
Invariant: a pipeline never has two drivers: the old one has ended before the next one starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from mlx_cluster import log
from mlx_cluster.cluster.status import PipelineStatus
from mlx_cluster.errors import Recovering
from mlx_cluster.node.bringup import DrivenEngine, PipelineDriver
from mlx_cluster.plan import Plan
from mlx_cluster.request import Engine

_log = log.get(__name__)


class Drivers:
    def __init__(self, make_driver: Callable[[Plan], PipelineDriver]) -> None:
        self._make_driver = make_driver
        self._running: dict[str, tuple[PipelineDriver, asyncio.Task[None]]] = {}

    def statuses(self) -> tuple[PipelineStatus, ...]:
        return tuple(driver.status for driver, _ in self._running.values())

    def nodes_changed(self) -> None:
        for driver, _ in self._running.values():
            driver.nodes_changed()

    async def end_all_but(self, plans: Iterable[Plan]) -> None:
        """End the drivers of every other plan; their running requests hear that they are being replaced."""
        kept = {plan.pipeline: plan for plan in plans}
        stale = [name for name, (driver, _) in self._running.items() if kept.get(name) != driver.plan]
        await asyncio.gather(*(self._end(name) for name in stale))

    def start(self, plans: Iterable[Plan]) -> None:
        """Drive these plans; those that are driven already go on."""
        for plan in plans:
            if plan.pipeline not in self._running:
                driver = self._make_driver(plan)
                task = asyncio.create_task(_drive(driver), name=f"drive {plan.pipeline}")
                self._running[plan.pipeline] = (driver, task)

    def engine(self, pipeline: str) -> DrivenEngine | None:
        """The engine of a pipeline that is ready, else None."""
        found = self._running.get(pipeline)
        return found[0].engine if found is not None else None

    def statistics(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the engines that are ready say of themselves, by (model, pipeline)."""
        drivers = [driver for driver, _ in self._running.values()]
        return {(d.plan.model.id, d.plan.pipeline): d.engine.statistics() for d in drivers if d.engine is not None}

    def resolve(self, pipeline: str) -> Engine:
        """For gateways of other nodes. Raises ``Recovering`` with the state of the pipeline."""
        engine = self.engine(pipeline)
        if engine is not None:
            return engine
        found = self._running.get(pipeline)
        if found is None:
            raise Recovering(f"{pipeline} is not driven by this node any more")
        raise Recovering(f"{pipeline} is {found[0].status.state}: {found[0].status.detail}")

    async def _end(self, pipeline: str) -> None:
        _, task = self._running.pop(pipeline)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _drive(driver: PipelineDriver) -> None:
    try:
        await driver.run()
    except Exception:  # noqa: BLE001  # logged with its traceback
        # The root of the driver: a bug must show as a failed pipeline, not as one that is loading for ever.
        _log.exception("driver ended", pipeline=driver.plan.pipeline)
        driver.crashed()
