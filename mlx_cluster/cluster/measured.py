"""What a running pipeline has shown of its nodes and of its head. Pure.

Owns: the step from the stages' measured times to speeds and the head's cost, and when a better plan is worth a pause.
Does not own: where the times come from (the engine's reports), placement itself (``placement``).
Invariant: a stage that was not measured changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mlx_cluster.cluster.placement import ModelCosts, NodeBudget, Placement
from mlx_cluster.plan import StageAssignment

# A new plan is worth the pause that it costs when the slowest stage gets this much faster, no less.
WORTH_A_MOVE = 0.85


@dataclass(frozen=True, slots=True)
class Measured:
    """``layers_per_second`` of each node of the plan; ``head_layers``: the head's time in layers (None: unknown)."""

    layers_per_second: Mapping[int, float]
    head_layers: float | None = None


def measure(
    stages: Sequence[StageAssignment], step_seconds: Sequence[float], speeds: Mapping[int, float]
) -> Measured | None:
    """From the time that each stage of a plan takes for the same decode step.

    Only the last stage has a head, so what its layers take must come from elsewhere: from the other stages, through the
    nodes' relative ``speeds`` (1 where unknown). With one stage, or an unmeasured one, there is nothing to learn: None.
    """
    if len(stages) < 2 or len(step_seconds) != len(stages) or min(step_seconds) <= 0:
        return None
    *before, last = stages
    per_second = {s.node_id: s.num_layers / t for s, t in zip(before, step_seconds, strict=False)}
    unit = fmean(rate / speeds.get(node_id, 1.0) for node_id, rate in per_second.items())
    own = per_second.get(last.node_id, unit * speeds.get(last.node_id, 1.0))
    head_layers = max(0.0, step_seconds[-1] * own - last.num_layers)
    return Measured({**per_second, last.node_id: own}, head_layers)


def with_measured(
    costs: ModelCosts, nodes: Sequence[NodeBudget], measured: Measured
) -> tuple[ModelCosts, list[NodeBudget]]:
    """Costs and nodes as they were seen. Nodes outside the plan keep their speed, in the unit of the measured ones."""
    seen = measured.layers_per_second
    known = [seen[node.node_id] / node.speed for node in nodes if node.node_id in seen]
    unit = fmean(known) if known else 1.0
    speeds = [replace(node, speed=seen.get(node.node_id, node.speed * unit)) for node in nodes]
    return replace(costs, head_layers=measured.head_layers), speeds


def pays(current: Placement, better: Placement) -> bool:
    """Whether ``better`` is worth re-planning a pipeline that runs as ``current``, both weighed with the same costs."""
    if current.assignments == better.assignments:
        return False
    return better.slowest_cost < WORTH_A_MOVE * current.slowest_cost
