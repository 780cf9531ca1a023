"""Plans and epochs: frozen values that say which node runs which layers.

Owns: the rule that a plan covers every layer exactly once, and the order of epochs.
Does not own: how a plan is found (``cluster.placement``) or carried out (``node``).
Invariant: a ``Plan`` that exists is valid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_cluster.errors import PlanError


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """(plan version, incarnation), compared in that order; messages of a lower one are dropped."""

    version: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.version}.{self.incarnation}"

    @classmethod
    def parse(cls, text: str) -> Epoch:
        """Inverse of ``str``. Raises ``ValueError`` on anything else."""
        version, _, incarnation = text.partition(".")
        return cls(int(version), int(incarnation))


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by its id and the hash of its manifest, never by somebody's path."""

    id: str
    manifest_hash: str
    num_layers: int


@dataclass(frozen=True, slots=True)
class StageAssignment:
    """Layers ``[start, end)`` of a pipeline on one node; ``index`` counts stages from 0."""

    index: int
    node_id: int
    start: int
    end: int

    @property
    def num_layers(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """One model placed on an ordered list of stages.

    Raises ``PlanError`` when the stages leave out a layer, hold one twice, are empty, or are not in order.
    """

    pipeline: str
    version: int
    model: ModelRef
    stages: tuple[StageAssignment, ...]
    transport: str
    transport_reason: str = ""

    def __post_init__(self) -> None:
        check_cover([(s.start, s.end) for s in self.stages], self.model.num_layers)
        if [s.index for s in self.stages] != list(range(len(self.stages))):
            raise PlanError(f"stage indices {[s.index for s in self.stages]} are not 0…{len(self.stages) - 1} in order")

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def engine_node_id(self) -> int:
        """The node of stage 0: its agent hosts the engine and drives the bring-up."""
        return self.stages[0].node_id

    def stage_of(self, node_id: int) -> StageAssignment | None:
        """The first stage on this node, or None when it holds no layers of this pipeline."""
        return next((s for s in self.stages if s.node_id == node_id), None)

    def hash(self) -> str:
        """A short digest of everything in the plan; neighbours compare it in their handshake."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline,
            "version": self.version,
            "model": {
                "id": self.model.id,
                "manifest_hash": self.model.manifest_hash,
                "num_layers": self.model.num_layers,
            },
            "stages": [{"index": s.index, "node_id": s.node_id, "start": s.start, "end": s.end} for s in self.stages],
            "transport": self.transport,
            "transport_reason": self.transport_reason,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        return cls(
            pipeline=data["pipeline"],
            version=data["version"],
            model=ModelRef(**data["model"]),
            stages=tuple(StageAssignment(**s) for s in data["stages"]),
            transport=data["transport"],
            transport_reason=data["transport_reason"],
        )


def check_cover(ranges: Sequence[tuple[int, int]], num_layers: int) -> None:
    """Raise ``PlanError`` unless the half-open ranges cover ``0…num_layers`` once, in order."""
    if not ranges:
        raise PlanError(f"no stage holds any of the {num_layers} layers")
    expected = 0
    for index, (start, end) in enumerate(ranges):
        if end <= start:
            raise PlanError(f"stage {index} holds no layer: [{start}, {end}) is empty; give it at least one layer")
        if start > expected:
            raise PlanError(
                f"layers {expected}…{start - 1} are on no stage: stage {index} starts at {start}; "
                f"let it start at {expected}"
            )
        if start < expected:
            raise PlanError(
                f"layers {start}…{min(end, expected) - 1} are on two stages: stage {index} starts at {start}; "
                f"let it start at {expected}"
            )
        expected = end
    if expected != num_layers:
        what = "are on no stage" if expected < num_layers else "do not exist"
        low, high = sorted((expected, num_layers))
        raise PlanError(
            f"layers {low}…{high - 1} {what}: the split ends at {expected}, the model has {num_layers} layers"
        )


def ranges_from_counts(counts: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """``[10, 9, 9]`` → ``[(0, 10), (10, 19), (19, 28)]``, checked to cover ``num_layers``."""
    ranges: list[tuple[int, int]] = []
    start = 0
    for count in counts:
        ranges.append((start, start + count))
        start += count
    check_cover(ranges, num_layers)
    return ranges


def even_counts(num_layers: int, num_stages: int) -> list[int]:
    """Layers as even as possible, the larger slices first: 28 over 3 is ``[10, 9, 9]``."""
    if not 1 <= num_stages <= num_layers:
        raise PlanError(f"{num_layers} layers cannot be cut into {num_stages} stages: use 1 to {num_layers} nodes")
    quotient, rest = divmod(num_layers, num_stages)
    return [quotient + (index < rest) for index in range(num_stages)]
