"""What a stage process is told when it starts: the plan's slice, seen with this node's settings.

Owns: the ``StageSpec`` of a stage, and the bytes that its rows may take. Does not own: the process (``stages``), the
plan (``cluster.coordinator``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_cluster.config.quantity import parse_bytes
from mlx_cluster.config.schema import Compression, Settings
from mlx_cluster.node.identity import Identity
from mlx_cluster.node.kv_budget import kv_budget, measured_room
from mlx_cluster.node.models import LocalModels
from mlx_cluster.plan import Epoch, Plan
from mlx_cluster.stage.spec import DiskSpec, StageSpec


class StageSpecs:
    """``stage_port`` gives the port that the next stage process listens on, ``room`` the bytes a pipeline may take."""

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        models: LocalModels,
        stage_port: Callable[[], int],
        room: Callable[[str], int],
    ) -> None:
        self._settings, self._identity, self._models = settings, identity, models
        self._stage_port, self._room = stage_port, room

    def make(self, plan: Plan, index: int, epoch: Epoch) -> StageSpec:
        """Raises ``CheckpointError`` when this node's model is not the plan's."""
        runtime = self._settings.runtime
        return StageSpec(
            plan=plan,
            index=index,
            epoch=epoch,
            model_dir=str(self._models.directory_for(plan)),
            host=self._identity.bind_host,
            port=self._stage_port(),
            device=runtime.device,
            dequantize=runtime.dequantize,
            memory_budget_bytes=self._room(plan.pipeline),
            link_timeout_seconds=self._settings.network.link_timeout,
            log_level=self._settings.log.level,
            prefix_disk=self._prefix_disk(),
            kv_bits=runtime.kv_bits,
            kv_group_size=runtime.kv_group_size,
            compression=self._compression(plan, index),
        )

    def kv_budget(self, granted_bytes: int | None, weight_bytes: int) -> int:
        """Bytes for rows of a stage that has loaded; runs in a thread."""
        runtime = self._settings.runtime
        prefix_bytes = parse_bytes(runtime.prefix_cache.max_bytes) if runtime.prefix_cache.enabled else 0
        return kv_budget(runtime.kv_budget, measured_room(granted_bytes, weight_bytes), prefix_bytes)

    def _compression(self, plan: Plan, index: int) -> Compression:
        """Of what the stage sends to the next one."""
        network = self._settings.network
        if index + 1 == plan.num_stages:
            return "off"
        low, high = sorted(stage.node_id for stage in plan.stages[index : index + 2])
        special = network.links.get(f"{low}-{high}")
        return special.compression if special is not None and special.compression is not None else network.compression

    def _prefix_disk(self) -> DiskSpec | None:
        section = self._settings.runtime.prefix_cache
        if not section.enabled or section.disk is None:
            return None
        path = self._identity.state_dir / Path(section.disk.path).expanduser()
        return DiskSpec(str(path), parse_bytes(section.disk.max_bytes))
