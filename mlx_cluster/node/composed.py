"""An engine with what stands in front of it: kept answers, then shared runs, then the pipeline.

Requests with a key, which a client may attach to again, are nobody else's: they go by the generations that are held.

Owns: their order, and which of them a node has by its settings.
Does not own: any of the parts (``engine``), when an engine comes and goes (``bringup``).
Invariant: a pipeline's life (start, canary, loss, stop) is its own; only ``generate`` goes through what is in front.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from mlx_cluster.config.quantity import parse_bytes
from mlx_cluster.config.schema import ApiGatewaySection, ResponseCacheSection
from mlx_cluster.engine.held import HeldEngine
from mlx_cluster.engine.response_cache import CachingEngine, ResponseCache
from mlx_cluster.engine.response_file import ResponseFile
from mlx_cluster.engine.sharing import SharingEngine
from mlx_cluster.errors import ClusterError
from mlx_cluster.node.bringup import DrivenEngine
from mlx_cluster.plan import Plan
from mlx_cluster.request import Engine, Event, SequenceRequest


class ComposedEngine:
    """Implements ``bringup.DrivenEngine`` over a pipeline's own engine."""

    def __init__(
        self,
        pipeline: DrivenEngine,
        plan: Plan,
        *,
        share: bool,
        cache: ResponseCache | None,
        reattach: ApiGatewaySection | None = None,
    ) -> None:
        """``reattach`` has the bounds of held generations; without it, or with no window, none are held."""
        self._pipeline = pipeline
        self._held: HeldEngine | None = None
        if reattach is not None and reattach.reattach_window > 0:
            self._held = HeldEngine(pipeline, reattach.reattach_window, parse_bytes(reattach.reattach_max_bytes))
        self._parts: list[SharingEngine | CachingEngine] = []
        self._front: Engine = pipeline
        if share:
            self._add(SharingEngine(self._front))
        if cache is not None:
            self._add(CachingEngine(self._front, cache, plan.model.manifest_hash, plan.pipeline))

    def _add(self, part: SharingEngine | CachingEngine) -> None:
        self._parts.append(part)
        self._front = part

    @property
    def lost(self) -> asyncio.Event:
        return self._pipeline.lost

    @property
    def lost_reason(self) -> str:
        return self._pipeline.lost_reason

    @property
    def hung(self) -> int | None:
        return self._pipeline.hung

    @property
    def running(self) -> int:
        return self._pipeline.running

    @property
    def step_seconds(self) -> tuple[float, ...]:
        return self._pipeline.step_seconds

    async def start(self, timeout_seconds: float) -> None:
        await self._pipeline.start(timeout_seconds)

    async def canary(self, timeout_seconds: float) -> None:
        await self._pipeline.canary(timeout_seconds)

    async def stop(self, error: ClusterError | None = None) -> None:
        await self._pipeline.stop(error)
        if self._held is not None:
            self._held.close()  # after the pipeline: attachments hear what it ended with

    def statistics(self) -> dict[str, Any]:
        figures = self._pipeline.statistics()
        for part in self._parts:
            figures |= part.statistics()
        if self._held is not None:
            figures |= self._held.statistics()
        return figures

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        if request.key and self._held is not None:
            return self._held.generate(request)
        return self._front.generate(request)


def response_cache(section: ResponseCacheSection, state_dir: Path) -> ResponseCache | None:
    """The cache that the settings ask for; a path that is not absolute is below the node's own directory."""
    if not section.enabled:
        return None
    max_bytes = parse_bytes(section.max_bytes)
    file = None
    if section.path is not None:
        file = ResponseFile(state_dir / section.path, max_bytes, section.ttl_seconds, time.time)
    return ResponseCache(max_bytes, section.ttl_seconds, time.time, file)
