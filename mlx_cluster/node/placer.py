"""From the living nodes to a plan: placement and transport put together.

Owns: what placement is told of nodes and models, and what the transport choice is told of a plan.
Does not own: either decision (``cluster.placement``, ``transport.choose``), nor when a plan is made (``coordinator``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlx_cluster.cluster.coordinator import agreed_facts, available_bytes
from mlx_cluster.cluster.placement import ManualRange, ModelCosts, NodeBudget, place
from mlx_cluster.cluster.status import ModelFacts, NodeStatus
from mlx_cluster.config.names import manual_stages
from mlx_cluster.config.schema import ModelEntry, Settings
from mlx_cluster.errors import ConfigError, LinkUnavailable, PlanError
from mlx_cluster.plan import ModelRef, Plan
from mlx_cluster.transport.choose import ALWAYS_THERE, Choice, choose


class ClusterPlacer:
    """Implements ``coordinator.Placer`` with this cluster's settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def wanted_split(self, entry: ModelEntry) -> Mapping[int, tuple[int, int]]:
        return {stage.node_id: (stage.start, stage.end) for stage in manual_stages(self._settings, entry)}

    def __call__(self, model_id: str, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int) -> Plan:
        """A plan over the nodes that hold the model. Raises ``PlanError`` with the missing bytes and where."""
        facts, holders = agreed_facts(model_id, nodes)
        try:
            manual = [ManualRange(i, start, end) for i, (start, end) in self.wanted_split(entry).items()]
        except ConfigError as error:
            raise PlanError(str(error)) from error
        budgets = [NodeBudget(s.node_id, s.name, available_bytes(s, model_id, nodes)) for s in holders]
        try:
            placement = place(costs_of(facts, facts.dense_ratio), budgets, manual=manual)
        except PlanError:
            if facts.least_ratio >= facts.dense_ratio:
                raise
            placement = place(costs_of(facts, facts.least_ratio), budgets, manual=manual)
        plan = Plan(
            pipeline=model_id,
            version=version,
            model=ModelRef(model_id, facts.manifest_hash, facts.num_layers),
            stages=placement.assignments,
            transport="grpc",
        )
        try:
            return with_transport(self._settings, plan, nodes, {})
        except LinkUnavailable as error:
            raise PlanError(str(error)) from error


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
