"""From the living nodes to a plan: placement and transport put together.

Owns: what placement is told of nodes and models, and what the transport choice is told of a plan.
Does not own: either decision (``cluster.placement``, ``transport.choose``), nor when a plan is made (``coordinator``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace

from mlx_cluster.cluster.coordinator import agreed_facts, available_bytes
from mlx_cluster.cluster.measured import Measured, measure, pays, with_measured
from mlx_cluster.cluster.placement import ManualRange, ModelCosts, NodeBudget, Placement, place, stage_bytes
from mlx_cluster.cluster.replicas import Load, beside, place_replicas, substituted, substitutes
from mlx_cluster.cluster.status import ModelFacts, NodeStatus
from mlx_cluster.config.names import manual_stages, settings_of_node
from mlx_cluster.config.schema import ModelEntry, Settings
from mlx_cluster.errors import ConfigError, LinkUnavailable, PlanError
from mlx_cluster.plan import ModelRef, Plan
from mlx_cluster.transport.choose import ALWAYS_THERE, Choice, choose


class ClusterPlacer:
    """Implements ``coordinator.Placer`` with this cluster's settings.

    It remembers what running pipelines have shown of their nodes, for the next time that something is placed.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        entries = settings.cluster.nodes
        self._standby = {entry.node_id for entry in entries if settings_of_node(settings, entry).standby}
        self._active = {entry.node_id for entry in entries} - self._standby
        self._measured: dict[str, Measured] = {}

    def observe(self, nodes: Iterable[NodeStatus]) -> None:
        """Remember the step times that pipelines show."""
        for status in nodes:
            for pipeline in status.pipelines:
                seen = measure(pipeline.plan.stages, pipeline.step_seconds, {})
                if seen is not None:
                    self._measured[pipeline.plan.model.id] = seen

    def wanted_split(self, entry: ModelEntry, living: Container[int]) -> Mapping[int, tuple[int, int]]:
        """See ``coordinator.Placer``. The layers of an absent node are its substitute's."""
        return {m.node_id: (m.start, m.end) for m in self._manual(entry, living)}

    def place(
        self, model_id: str, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int, kept: Sequence[Plan]
    ) -> tuple[Plan, ...]:
        """See ``coordinator.Placer``. Raises ``PlanError`` with the missing bytes and where."""
        facts, holders = agreed_facts(model_id, nodes)
        names = free_names(model_id, entry.replicas, kept)
        manual = self._manual(entry, {s.node_id for s in holders})

        def attempt(ratio: float, only: Sequence[NodeStatus]) -> list[Placement]:
            costs, budgets = self._weighed(facts, ratio, only, nodes, kept)
            if manual and {m.node_id for m in manual} <= {s.node_id for s in only}:
                return [place(costs, budgets, manual=manual)]
            if len(names) > 1:
                return place_replicas(costs, budgets, len(names), objective=entry.objective)
            held = loaded_layers(names[0], nodes) if names else {}
            return [place(costs, budgets, manual=manual, objective=entry.objective, loaded=held)]

        placements = self._first_that_fits(facts, holders, nodes, attempt)
        return tuple(
            self._plan(name, version, facts, placement, nodes)
            for name, placement in zip(names, placements, strict=False)
        )

    def better(
        self, plan: Plan, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int, kept: Sequence[Plan]
    ) -> Plan | None:
        """See ``coordinator.Placer``."""
        others = [each for each in kept if each.pipeline != plan.pipeline]
        facts, holders = agreed_facts(plan.model.id, nodes)
        usable = [s for s in holders if s.node_id in self._in_use({s.node_id for s in holders})]
        able, present = {s.node_id for s in holders}, {s.node_id for s in plan.stages}
        if self._manual(entry, able) or not present <= able:
            return None
        stays = present <= {s.node_id for s in usable}
        costs, budgets = self._weighed(facts, facts.dense_ratio, usable, nodes, others)
        now = [ManualRange(s.node_id, s.start, s.end) for s in plan.stages]
        try:
            held = loaded_layers(plan.pipeline, nodes)
            best = place(costs, budgets, objective=entry.objective, loaded=held)
            # A standby whose work somebody else can do is relieved, whether that is quicker or not.
            if stays and not pays(place(costs, budgets, manual=now), best):
                return None
        except PlanError:
            return None  # weights stay packed: a plan that just fits is left alone
        return self._plan(plan.pipeline, version, facts, best, nodes)

    # -- what placement is told ---------------------------------------------------------------------------------

    def _manual(self, entry: ModelEntry, living: Container[int]) -> list[ManualRange]:
        try:
            wanted = [ManualRange(s.node_id, s.start, s.end) for s in manual_stages(self._settings, entry)]
        except ConfigError as error:
            raise PlanError(str(error)) from error
        return substituted(wanted, self._substitutes(living))

    def _substitutes(self, living: Container[int]) -> dict[int, int]:
        return substitutes(sorted(self._active), sorted(self._standby), living.__contains__)

    def _in_use(self, living: Container[int]) -> set[int]:
        """The nodes that should hold layers now: no standby without somebody to stand in for."""
        return self._active | set(self._substitutes(living).values())

    def _first_that_fits(
        self,
        facts: ModelFacts,
        holders: Sequence[NodeStatus],
        nodes: Sequence[NodeStatus],
        attempt: Callable[[float, Sequence[NodeStatus]], list[Placement]],
    ) -> list[Placement]:
        """Dense weights before packed ones, without the standbys before with all of them."""
        in_use = self._in_use({s.node_id for s in nodes})
        choices = [[s for s in holders if s.node_id in in_use], list(holders)]
        error: PlanError | None = None
        for only in [only for index, only in enumerate(choices) if only and only not in choices[:index]]:
            for ratio in dict.fromkeys((facts.dense_ratio, min(facts.dense_ratio, facts.least_ratio))):
                try:
                    return attempt(ratio, only)
                except PlanError as failure:
                    error = failure
        assert error is not None, "there is at least one holder"
        raise error

    def _weighed(
        self,
        facts: ModelFacts,
        ratio: float,
        only: Sequence[NodeStatus],
        nodes: Sequence[NodeStatus],
        kept: Sequence[Plan],
    ) -> tuple[ModelCosts, list[NodeBudget]]:
        costs = costs_of(facts, ratio)
        loads = promised(kept, nodes)
        speeds = speeds_of(only)
        own = [NodeBudget(s.node_id, s.name, available_bytes(s, facts.id, nodes), speeds[s.node_id]) for s in only]
        budgets = beside(own, loads)
        measured = self._measured.get(facts.id)
        return with_measured(costs, budgets, measured) if measured is not None else (costs, budgets)

    def _plan(
        self, pipeline: str, version: int, facts: ModelFacts, placement: Placement, nodes: Sequence[NodeStatus]
    ) -> Plan:
        plan = Plan(
            pipeline=pipeline,
            version=version,
            model=ModelRef(facts.id, facts.manifest_hash, facts.num_layers),
            stages=placement.assignments,
            transport="grpc",
        )
        try:
            return with_transport(self._settings, plan, nodes, {})
        except LinkUnavailable as error:
            raise PlanError(str(error)) from error


def free_names(model_id: str, replicas: int, kept: Iterable[Plan]) -> list[str]:
    """Names for the replicas that are missing: the model's id, then ``id#2`` and so on."""
    taken = {plan.pipeline for plan in kept}
    names = [model_id, *(f"{model_id}#{number}" for number in range(2, replicas + 1))]
    return [name for name in names if name not in taken]


def loaded_layers(pipeline: str, nodes: Iterable[NodeStatus]) -> dict[int, tuple[int, int]]:
    """Which layers of a pipeline the nodes' processes hold, by node id."""
    return {
        status.node_id: (stage.start, stage.end)
        for status in nodes
        for stage in status.stages
        if stage.pipeline == pipeline and stage.pid and stage.state in ("loaded", "linking", "linked")
    }


def promised(kept: Sequence[Plan], nodes: Sequence[NodeStatus]) -> dict[int, Load]:
    """What the kept plans take of each node beyond what its stages hold already, and how many compute there.

    A stage that has not loaded yet, and the cache of one that has, is memory that only looks free.
    """
    loads: dict[int, Load] = {}
    by_id = {status.node_id: status for status in nodes}
    for plan in kept:
        for stage in plan.stages:
            status = by_id.get(stage.node_id)
            facts = status.model(plan.model.id) if status is not None else None
            if status is None or facts is None:
                continue
            held = sum(s.memory_bytes for s in status.stages if (s.pipeline, s.index) == (plan.pipeline, stage.index))
            needed = stage_bytes(costs_of(facts, facts.least_ratio), stage.start, stage.end)
            old = loads.get(stage.node_id, Load())
            loads[stage.node_id] = Load(old.num_bytes + max(0, needed - held), old.pipelines + 1)
    return loads


def speeds_of(nodes: Sequence[NodeStatus]) -> dict[int, float]:
    """Relative speeds, to a tenth, from what the nodes measured at join; all 1 unless every one of them has."""
    slowest = min((s.speed_bytes_per_second for s in nodes), default=0.0)
    if slowest <= 0:
        return {s.node_id: 1.0 for s in nodes}
    return {s.node_id: round(s.speed_bytes_per_second / slowest, 1) for s in nodes}


def costs_of(facts: ModelFacts, ratio: float) -> ModelCosts:
    """What placement weighs: weights times ``ratio``, and the cache of one full context."""
    return ModelCosts(
        embedding_bytes=round(facts.embed_bytes * ratio),
        layer_bytes=tuple(round(num_bytes * ratio) for num_bytes in facts.layer_bytes),
        head_bytes=round(facts.head_bytes * ratio),
        kv_bytes=facts.kv_bytes_per_token * facts.max_context,
        tied=facts.tied,
        embedding_everywhere=facts.embedding_everywhere,
        legal_cuts=None if facts.legal_cuts is None else frozenset(facts.legal_cuts),
    )


def with_transport(settings: Settings, plan: Plan, nodes: Sequence[NodeStatus], failed: Mapping[str, str]) -> Plan:
    """The plan with the kind of its links chosen. Raises ``LinkUnavailable`` when what was asked for cannot be."""
    by_id = {status.node_id: status for status in nodes}
    stages_on: Counter[str] = Counter()
    for stage in plan.stages:
        if (status := by_id.get(stage.node_id)) is not None:
            stages_on[status.machine] += 1
    cores = [
        status.cores // stages_on[status.machine]
        for stage in plan.stages
        if (status := by_id.get(stage.node_id)) is not None
    ]
    choice: Choice = choose(
        settings.network.transport,
        num_stages=plan.num_stages,
        cores_per_stage=cores,
        tls_required=settings.network.tls_required,
        trusted=not settings.network.tls_required,
        available=_available(plan, by_id),
        failed=failed,
    )
    return replace(plan, transport=choice.kind, transport_reason=choice.reason)


def _available(plan: Plan, nodes: Mapping[int, NodeStatus]) -> frozenset[str]:
    """Kinds that every stage's node can bring up; mpi when the stages are the ranks of one mpirun, in order."""
    holders = [nodes[stage.node_id] for stage in plan.stages if stage.node_id in nodes]
    kinds = frozenset.intersection(*(frozenset(status.transports) for status in holders)) if holders else ALWAYS_THERE
    ranks = [(index, plan.num_stages) for index in range(plan.num_stages)]
    return kinds | {"mpi"} if [status.mpi for status in holders] == ranks else kinds
