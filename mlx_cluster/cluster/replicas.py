"""Several pipelines on one set of nodes: replicas of a model side by side, and models beside each other. Pure.

Owns: which nodes each replica gets, what a node that is shared has left, and who stands in for a node that is away.
Does not own: how one pipeline is cut (``placement``).
Invariant: no node is promised beyond its budget; as many replicas as fit, never more than asked for.

Replicas get neighbouring nodes (in the order given) where there are enough of them, in the partition with the highest
sum of throughputs; with more replicas than nodes the rest share nodes, each taking its part of their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_cluster.cluster.placement import ManualRange, ModelCosts, NodeBudget, Objective, Placement, place
from mlx_cluster.errors import PlanError


@dataclass(frozen=True, slots=True)
class Load:
    """What other pipelines take of a node: bytes, and how many of them compute there."""

    num_bytes: int = 0
    pipelines: int = 0


def beside(nodes: Sequence[NodeBudget], loads: Mapping[int, Load]) -> list[NodeBudget]:
    """What is left of the nodes beside other pipelines; those compute too, so each gets its share of the time."""
    return [_left(node, loads.get(node.node_id, Load())) for node in nodes]


def _left(node: NodeBudget, load: Load) -> NodeBudget:
    budget = None if node.budget_bytes is None else max(0, node.budget_bytes - load.num_bytes)
    return replace(node, budget_bytes=budget, speed=node.speed / (1 + load.pipelines))


def loads_of(placements: Sequence[Placement]) -> dict[int, Load]:
    """What these placements take together, by node id."""
    loads: dict[int, Load] = {}
    for placement in placements:
        for stage in placement.stages:
            old = loads.get(stage.assignment.node_id, Load())
            loads[stage.assignment.node_id] = Load(old.num_bytes + stage.memory_bytes, old.pipelines + 1)
    return loads


def place_replicas(
    costs: ModelCosts, nodes: Sequence[NodeBudget], count: int, *, objective: Objective = "throughput"
) -> list[Placement]:
    """Up to ``count`` placements of one model, at least one. Raises ``PlanError`` when not even one fits."""
    for wanted in range(min(count, len(nodes)), 1, -1):
        found = _side_by_side(costs, nodes, wanted, objective)
        if found is not None:
            return _add_sharing(found, costs, nodes, count, objective)
    first = place(costs, nodes, objective=objective)
    return _add_sharing([first], costs, nodes, count, objective)


def _side_by_side(
    costs: ModelCosts, nodes: Sequence[NodeBudget], count: int, objective: Objective
) -> list[Placement] | None:
    """The best partition into ``count`` runs of neighbouring nodes, or None when some replica would not fit in any."""
    tried: dict[tuple[int, int], Placement | None] = {}

    def run(start: int, end: int) -> Placement | None:
        if (start, end) not in tried:
            try:
                tried[start, end] = place(costs, nodes[start:end], objective=objective)
            except PlanError:
                tried[start, end] = None
        return tried[start, end]

    whole = sum(costs.layer_bytes) + costs.head_cost
    # best[end]: throughput of the replicas so far over the nodes before ``end``, that of the slowest (among equals it
    # should be fast, so that no client is worse off than others), and their placements.
    best: dict[int, tuple[float, float, list[Placement]]] = {0: (0.0, math.inf, [])}
    for index in range(count):
        behind = count - index - 1
        following: dict[int, tuple[float, float, list[Placement]]] = {}
        for start, (sum_so_far, least, placed) in best.items():
            ends = range(start + 1, len(nodes) - behind + 1) if behind else (len(nodes),)
            for end in ends:
                placement = run(start, end)
                if placement is None:
                    continue
                rate = whole / max(placement.slowest_cost, 1e-12)
                value = (round(sum_so_far + rate, 9), min(least, rate))
                if end not in following or value > following[end][:2]:
                    following[end] = (*value, [*placed, placement])
        best = following
    return best[len(nodes)][2] if len(nodes) in best else None


def _add_sharing(
    placed: list[Placement], costs: ModelCosts, nodes: Sequence[NodeBudget], count: int, objective: Objective
) -> list[Placement]:
    """More replicas, on what the first ones left, as long as they fit."""
    while len(placed) < count:
        try:
            placed.append(place(costs, beside(nodes, loads_of(placed)), objective=objective))
        except PlanError:
            break
    return placed


# -- standby nodes ----------------------------------------------------------------------------------------


def substitutes(active: Sequence[int], standby: Sequence[int], living: Callable[[int], bool]) -> dict[int, int]:
    """Which living standby node stands in for which configured node that is away, in the order of their ids."""
    away = [node_id for node_id in sorted(active) if not living(node_id)]
    ready = [node_id for node_id in sorted(standby) if living(node_id)]
    return dict(zip(away, ready, strict=False))


def substituted(manual: Sequence[ManualRange], instead: Mapping[int, int]) -> list[ManualRange]:
    """The split with the layers of each absent node on its substitute, so that nobody else moves."""
    return [replace(each, node_id=instead.get(each.node_id, each.node_id)) for each in manual]
