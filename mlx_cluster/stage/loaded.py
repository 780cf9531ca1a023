"""What the mlx thread of a stage process holds: a slice's weights, and the runner over them.

Owns: loading, and going over to another epoch's spec with the weights that both have.
Does not own: the thread (``device``), when an epoch is over (``child``), the work in an epoch (``worker``).
Invariant: between two epochs only weights, compiled code and files on the disk stay: no row, group or entry of an older
epoch is ever found in a newer one. Every method but ``held`` runs on the mlx thread.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cluster import log
from mlx_cluster.microbatch import Held, Runner, Saved
from mlx_cluster.stage.emulation import EmulatedRunner
from mlx_cluster.stage.faults import FaultyRunner
from mlx_cluster.stage.spec import StageSpec

if TYPE_CHECKING:
    from mlx_cluster.model.runner import SliceRunner

Progress = Callable[[int, int], None]

logger = log.get("stage.loaded")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the agent and the engine are told of a slice that is ready for an epoch."""

    memory_bytes: int = 0
    can_trim: bool = True
    kv_fixed_bytes: int = 0
    kv_bytes_per_position: int = 0
    saved: tuple[Saved, ...] = ()


class LoadedStage:
    """Empty until ``load``."""

    def __init__(self) -> None:
        self._spec: StageSpec | None = None
        self._runner: Runner | None = None
        self._slice: SliceRunner | None = None
        self._held: Callable[[], Held] = _nothing

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "load comes first"
        return self._runner

    def held(self) -> Held:
        """Any thread may ask."""
        return self._held()

    def drop(self) -> None:
        """Forget rows, groups and entries. Returns only when the device has done all that it was given."""
        if self._slice is not None:
            self._slice.drop()

    def load(self, spec: StageSpec, on_progress: Progress) -> Facts:
        """Make the slice of this spec, of what is here already and of what the disk has.

        Raises ``CheckpointError``, ``UnsupportedModel``, ``StageStartError``.
        """
        before, self._spec = self._spec, spec
        if spec.emulation is not None:
            emulated = EmulatedRunner(spec.emulation, last=spec.index == spec.plan.num_stages - 1)
            self._runner, self._held = emulated, emulated.held
            return Facts()
        if self._slice is None or before is None or before.layers != spec.layers:
            self._slice = self._read(spec, on_progress)
        runner = self._slice
        disk = spec.prefix_disk
        saved = runner.keep_on_disk(Path(disk.path), disk.max_bytes, spec.plan.model.manifest_hash) if disk else []
        self._runner = FaultyRunner(runner, spec.faults) if spec.faults is not None else runner
        self._held = runner.held
        return Facts(
            runner.memory_bytes, runner.can_trim, runner.kv_fixed_bytes, runner.kv_bytes_per_position, tuple(saved)
        )

    def _read(self, spec: StageSpec, on_progress: Progress) -> SliceRunner:
        """Load the slice; weights that an earlier slice of this process has are taken over from it."""
        from mlx_cluster.model.quantized_cache import KvFormat
        from mlx_cluster.model.runner import SliceRunner  # only here: an emulated stage must not need mlx

        known = self._slice.retire() if self._slice is not None else {}
        # Whatever is not taken over is freed before anything is read: two slices might not fit.
        self._slice, self._runner, self._held = None, None, _nothing
        gc.collect()  # a slice and its swapped layers know each other
        start, end = spec.layers
        loaded = SliceRunner.load(
            Path(spec.model_dir),
            start,
            end,
            device=spec.device,
            dequantize=spec.dequantize,
            memory_budget_bytes=spec.memory_budget_bytes,
            kv=KvFormat(spec.kv_bits, spec.kv_group_size) if spec.kv_bits is not None else None,
            known=known,
            on_progress=on_progress,
        )
        loaded.warm_up()
        return loaded


def _nothing() -> Held:
    return Held(0, 0)
