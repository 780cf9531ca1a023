"""An engine with what stands in front of it: kept answers, then shared runs, then the pipeline.

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
from mlx_cluster.config.schema import ResponseCacheSection
from mlx_cluster.engine.response_cache import CachingEngine, ResponseCache
from mlx_cluster.engine.response_file import ResponseFile
from mlx_cluster.engine.sharing import SharingEngine
from mlx_cluster.errors import ClusterError
from mlx_cluster.node.bringup import DrivenEngine
from mlx_cluster.plan import Plan
from mlx_cluster.request import Engine, Event, SequenceRequest


class ComposedEngine:
    """Implements ``bringup.DrivenEngine`` over a pipeline's own engine."""

    def __init__(self, pipeline: DrivenEngine, plan: Plan, *, share: bool, cache: ResponseCache | None) -> None:
        self._pipeline = pipeline
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

    def statistics(self) -> dict[str, Any]:
        figures = self._pipeline.statistics()
        for part in self._parts:
            figures |= part.statistics()
        return figures

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
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
