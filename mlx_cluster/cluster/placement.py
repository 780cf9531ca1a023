"""Which node runs which layers: arithmetic over bytes, speeds and budgets.

Owns: the automatic placement (an exact dynamic programme) and the check of a split made by hand.
Does not own: where costs and budgets come from, or when to place anew (the coordinator decides both).
Invariant: a returned placement covers every layer once and keeps every node within its budget; the same inputs give the
same placement. Pure: no clock, no I/O.

A decode step reads a node's weights once, so a stage's time is its bytes over the node's speed, until a pipeline has
run and its head was measured (``cluster.measured``); the embedding is a lookup and takes memory only. Stages follow the
order in which the nodes are given, and a node may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from mlx_cluster.config.quantity import format_bytes
from mlx_cluster.errors import PlanError
from mlx_cluster.plan import StageAssignment, check_cover

Objective = Literal["throughput", "latency"]
MAX_ESTIMATE_ERROR = 0.25  # a guess of memory further off than this is worth a warning


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Weights in bytes: embedding, each layer, final norm and head.

    ``kv_bytes`` is the promised cache of one layer: it takes memory, not time. With ``tied`` the head reads the
    embedding, so the last stage holds it too. ``legal_cuts`` are the layers at which a stage may start (None: any).
    ``head_layers`` is the measured time of the head in layers of average size (None: its bytes count).
    """

    embedding_bytes: int
    layer_bytes: tuple[int, ...]
    head_bytes: int
    kv_bytes: int = 0
    tied: bool = False
    embedding_everywhere: bool = False
    legal_cuts: frozenset[int] | None = None
    head_layers: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def head_cost(self) -> int:
        """Bytes of weights that would be read in the time of the head."""
        if self.head_layers is not None:
            return round(self.head_layers * sum(self.layer_bytes) / max(1, self.num_layers))
        return self.head_bytes + (self.embedding_bytes if self.tied else 0)


@dataclass(frozen=True, slots=True)
class NodeBudget:
    """What a node offers. ``budget_bytes`` None: no cap. ``speed`` is relative: 2.0 reads weights twice as fast."""

    node_id: int
    name: str
    budget_bytes: int | None = None
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class ManualRange:
    """Layers ``[start, end)`` that a person gave to a node."""

    node_id: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PlacedStage:
    assignment: StageAssignment
    memory_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """``stages`` in layer order; ``reason`` says what decided.

    ``slowest_cost`` is the time of the slowest stage, as bytes of weights that a node of speed 1 reads meanwhile.
    """

    stages: tuple[PlacedStage, ...]
    reason: str
    slowest_cost: float = 0.0

    @property
    def assignments(self) -> tuple[StageAssignment, ...]:
        return tuple(stage.assignment for stage in self.stages)


def place(
    costs: ModelCosts,
    nodes: Sequence[NodeBudget],
    *,
    manual: Sequence[ManualRange] = (),
    objective: Objective = "throughput",
    hop_bytes: int = 0,
    loaded: Mapping[int, tuple[int, int]] | None = None,
) -> Placement:
    """Place a model on ``nodes``, in their order.

    A ``manual`` split is obeyed while all its nodes are among ``nodes``, else placement is automatic. ``hop_bytes`` is
    what one more stage costs, as bytes of weights read meanwhile at speed 1. ``loaded`` is the range that a node's
    stage process holds already: among placements of the same cost the one is taken that keeps most of these bytes.
    Raises ``PlanError`` when the split leaves a gap or overlaps, or when the model does not fit: the message names the
    bytes and the node.
    """
    if not nodes:
        raise PlanError("no node is there to hold the model: start one")
    if not costs.num_layers:
        raise PlanError("the model has no layers")
    table = _Table(costs, nodes)
    away = [m.node_id for m in manual if m.node_id not in {node.node_id for node in nodes}]
    if manual and not away:
        return _obey(table, manual)
    why = f"automatic: nodes {', '.join(map(str, away))} of the split are away; " if away else "automatic: "
    return _choose(table, objective, hop_bytes, why, loaded or {})


def stage_bytes(costs: ModelCosts, start: int, end: int) -> int:
    """Bytes of weights and promised cache that a stage ``[start, end)`` holds."""
    return _Table(costs, (NodeBudget(0, ""),)).memory(start, end)


def estimate_warnings(placement: Placement, estimates: Mapping[int, int], names: Mapping[int, str]) -> list[str]:
    """One line for each node whose computed bytes are far from what somebody estimated."""
    lines: list[str] = []
    for stage in placement.stages:
        node_id = stage.assignment.node_id
        guess = estimates.get(node_id)
        if guess is not None and abs(stage.memory_bytes - guess) > MAX_ESTIMATE_ERROR * guess:
            lines.append(
                f"{names.get(node_id, f'node {node_id}')}: estimated_memory says {format_bytes(guess)}, "
                f"the layers take {format_bytes(stage.memory_bytes)}"
            )
    return lines


# -- arithmetic -------------------------------------------------------------------------------------


class _Table:
    """Bytes and time of any range of layers on any node, from prefix sums. Times are whole numbers, so sums are exact.

    Time is the bytes that the fastest node would read meanwhile, so nodes of equal speed compare without rounding.
    """

    def __init__(self, costs: ModelCosts, nodes: Sequence[NodeBudget]) -> None:
        if any(node.speed <= 0 for node in nodes):
            raise PlanError(f"node speeds {[node.speed for node in nodes]} must be above zero")
        self.costs, self.nodes = costs, nodes
        self.num_layers = costs.num_layers
        self._sums = [0, *accumulate(costs.layer_bytes)]
        self.fastest = max(node.speed for node in nodes)

    def memory(self, start: int, end: int) -> int:
        """Bytes of weights and promised cache that a stage ``[start, end)`` holds."""
        weights = self._sums[end] - self._sums[start]
        last = end == self.num_layers
        if start == 0 or self.costs.embedding_everywhere or (last and self.costs.tied):
            weights += self.costs.embedding_bytes
        if last:
            weights += self.costs.head_bytes
        return weights + (end - start) * self.costs.kv_bytes

    def time(self, node: int, start: int, end: int) -> int:
        """Bytes read per step over the node's speed."""
        read = self._sums[end] - self._sums[start]
        if end == self.num_layers:
            read += self.costs.head_cost
        return round(read * (self.fastest / self.nodes[node].speed))

    def kept(self, node: int, start: int, end: int, loaded: Mapping[int, tuple[int, int]]) -> int:
        """Bytes of these layers that the node has loaded already."""
        there = loaded.get(self.nodes[node].node_id)
        if there is None:
            return 0
        low, high = max(start, there[0]), min(end, there[1])
        return self._sums[high] - self._sums[low] if low < high else 0

    def may_end(self, end: int) -> bool:
        """Whether the family of the model allows a stage to end before layer ``end``."""
        return end == self.num_layers or self.costs.legal_cuts is None or end in self.costs.legal_cuts

    def excess(self, node: int, start: int, end: int) -> int:
        """Bytes above the node's budget."""
        budget = self.nodes[node].budget_bytes
        return 0 if budget is None else max(0, self.memory(start, end) - budget)


class _Range(NamedTuple):
    node: int  # index into the table's nodes
    start: int
    end: int


Value = tuple[int, ...]  # compared from left to right


def _best(
    table: _Table,
    value: Callable[[int, int, int], Value | None],
    join: Callable[[Value, Value], Value],
    zero: Value,
) -> tuple[Value, list[_Range]] | None:
    """The ranges that give the least joined value, nodes in order, any of them left out; None when nothing is allowed.

    ``value`` is None for a range that is not allowed. ``join`` must grow with both its arguments. Of equal results the
    one that gives earlier nodes more layers wins. O(nodes · layers²).
    """
    # best[j]: the least value of the nodes from here on for layers j…end, and the ranges that give it.
    best: dict[int, tuple[Value, tuple[_Range, ...]]] = {table.num_layers: (zero, ())}
    for node in reversed(range(len(table.nodes))):
        current = dict(best)  # leave this node out
        for start in range(table.num_layers):
            for end in range(table.num_layers, start, -1):
                if end not in best or not table.may_end(end):
                    continue
                behind, ranges = best[end]
                own = value(node, start, end)
                if own is None:
                    continue
                total = join(own, behind)
                if start not in current or total < current[start][0]:
                    current[start] = (total, (_Range(node, start, end), *ranges))
        best = current
    return (best[0][0], list(best[0][1])) if 0 in best else None


def _add(left: Value, right: Value) -> Value:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _choose(
    table: _Table, objective: Objective, hop_bytes: int, why: str, loaded: Mapping[int, tuple[int, int]]
) -> Placement:
    def time(node: int, start: int, end: int) -> Value | None:
        return None if table.excess(node, start, end) else (table.time(node, start, end),)

    slowest = _best(table, time, max, (0,))
    if slowest is None:
        raise PlanError(_does_not_fit(table))
    bound = slowest[0][0] if objective == "throughput" else None

    def costs(node: int, start: int, end: int) -> Value | None:
        own = table.time(node, start, end)
        if table.excess(node, start, end) or (bound is not None and own > bound):
            return None
        kept = table.kept(node, start, end, loaded)
        # Among equals the one that leaves most loaded layers where they are, then the most even one: the least sum of
        # squares.
        return (own + hop_bytes, -kept, own * own)

    chosen = _best(table, costs, _add, (0, 0, 0))
    assert chosen is not None, "the ranges of the first pass keep their own bound"
    ranges = chosen[1]
    top = max(ranges, key=lambda r: table.time(*r))
    why += (
        f"the slowest stage ({table.nodes[top.node].name}) is as fast as it can be"
        if objective == "throughput"
        else "one token takes the least time in all"
    )
    return _placement(table, ranges, why)


def _does_not_fit(table: _Table) -> str:
    """By how many bytes, and on which node, with the layers cut so that the least is missing."""
    least = _best(table, lambda node, start, end: (table.excess(node, start, end),), _add, (0,))
    assert least is not None, "without a limit one node can hold everything"
    (missing,), ranges = least
    where = [
        f"{table.nodes[r.node].name} would need {format_bytes(table.memory(r.start, r.end))} for layers "
        f"[{r.start}, {r.end}) and has {format_bytes(table.nodes[r.node].budget_bytes or 0)}"
        for r in ranges
        if table.excess(*r)
    ]
    return (
        f"the model does not fit: {format_bytes(missing)} ({missing} bytes) are missing; {'; '.join(where)}: "
        "lower max_context, raise memory_budget, add a node or take a smaller quantization"
    )


def _obey(table: _Table, manual: Sequence[ManualRange]) -> Placement:
    ordered = sorted(manual, key=lambda m: m.start)
    check_cover([(m.start, m.end) for m in ordered], table.num_layers)
    ids = [m.node_id for m in ordered]
    if len(set(ids)) != len(ids):
        raise PlanError(f"the split gives a node two stages (nodes {ids}): join them into one range")
    for m in ordered:
        if not table.may_end(m.end):
            legal = ", ".join(map(str, sorted(table.costs.legal_cuts or ())))
            raise PlanError(f"this model cannot be cut before layer {m.end}: its layers may be cut before {legal}")
    index_of = {node.node_id: index for index, node in enumerate(table.nodes)}
    ranges = [_Range(index_of[m.node_id], m.start, m.end) for m in ordered]
    for r in ranges:
        if excess := table.excess(*r):
            node = table.nodes[r.node]
            raise PlanError(
                f"the split does not fit: {node.name} needs {format_bytes(table.memory(r.start, r.end))} for layers "
                f"[{r.start}, {r.end}) and has {format_bytes(node.budget_bytes or 0)}; {format_bytes(excess)} "
                f"({excess} bytes) are missing: move layers to another node or lower max_context"
            )
    written = "/".join(str(r.end - r.start) for r in ranges)
    return _placement(table, ranges, f"manual: the split {written}")


def _placement(table: _Table, ranges: Sequence[_Range], reason: str) -> Placement:
    stages: list[PlacedStage] = []
    for index, r in enumerate(ranges):
        node = table.nodes[r.node]
        memory = table.memory(r.start, r.end)
        budget = "" if node.budget_bytes is None else f" of {format_bytes(node.budget_bytes)}"
        extra = (" + embedding" if r.start == 0 else "") + (" + head" if r.end == table.num_layers else "")
        speed = "" if node.speed == 1 else f", speed {node.speed:g}"
        stages.append(
            PlacedStage(
                StageAssignment(index, node.node_id, r.start, r.end),
                memory,
                f"{r.end - r.start} layers{extra}: {format_bytes(memory)}{budget}{speed}",
            )
        )
    slowest = max(table.time(*r) for r in ranges) / table.fastest
    return Placement(tuple(stages), reason, slowest)
