"""What the coordinator does: from the table of nodes and the document in force to the next document.

Owns: when to plan, when to keep a plan, who lacks the document. Pure, except ``push`` at the end.
Does not own: how layers are placed (``place``, an argument), who leads (``leader``), how a plan is carried out
(``node``).
Invariant: only the node that leads commits; a committed document outranks every document a living node has named; a
plan is replaced only when it cannot go on or the operator asks for something else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mlx_cluster import log
from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import ClusterView
from mlx_cluster.cluster.status import ModelFacts, NodeStatus
from mlx_cluster.config.schema import ModelEntry
from mlx_cluster.errors import ClusterError, PlanError, UnsupportedModel
from mlx_cluster.plan import Plan

GRACE_SECONDS = 20.0  # how long a fresh coordinator waits for nodes it has never heard

_log = log.get(__name__)


class Placer(Protocol):
    def observe(self, nodes: Iterable[NodeStatus]) -> None:
        """Learn what running pipelines show of their nodes."""
        ...

    def place(
        self, model_id: str, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int, kept: Sequence[Plan]
    ) -> tuple[Plan, ...]:
        """Plans for the replicas of a model that are missing, over (some of) the living nodes, beside the kept plans.

        As many as fit, at least one. Raises ``PlanError`` with the reason.
        """
        ...

    def better(
        self, plan: Plan, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int, kept: Sequence[Plan]
    ) -> Plan | None:
        """A plan for the same pipeline that is worth the pause, or None."""
        ...

    def wanted_split(self, entry: ModelEntry, living: Container[int]) -> Mapping[int, tuple[int, int]]:
        """The manual split as node id → ``[start, end)``; empty when placement is automatic."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """``commit`` a new document (None: keep), ``push`` the document in force to these nodes.

    ``unplaced`` says why a configured model has no plan; ``waiting`` why nothing is decided yet.
    """

    commit: ClusterDocument | None = None
    push: tuple[int, ...] = ()
    unplaced: tuple[tuple[str, str], ...] = ()
    waiting: str = ""


class Coordinator:
    """Decides once per heartbeat. ``transport`` is the configured one; ``started`` the boot time of this agent.

    A pipeline without work for ``quiet_seconds`` may be moved to a better plan.
    """

    def __init__(
        self,
        models: Mapping[str, ModelEntry],
        place: Placer,
        transport: str,
        started: float,
        grace_seconds: float = GRACE_SECONDS,
        quiet_seconds: float = 5.0,
    ) -> None:
        self._models, self._place, self._transport = models, place, transport
        self._grace_ends, self._quiet_seconds = started + grace_seconds, quiet_seconds
        self._led_term: int | None = None
        self._own: set[tuple[str, int]] = set()  # plans placed or adopted in the led term
        self._weighed: dict[str, frozenset[int]] = {}  # who held its model when a pipeline was last weighed
        self._quiet_since: dict[str, float] = {}

    def decide(self, view: ClusterView, leadership: Leadership, document: ClusterDocument, now: float) -> Decision:
        leads = leadership.node_id == view.self_id
        push = tuple(
            s.node_id
            for s in view.living
            if s.node_id != view.self_id and s.document < document.rank and (leads or s.node_id == leadership.node_id)
        )
        if not leads:
            self._led_term = None
            return Decision(push=push)
        newer = [s for s in view.living if s.document > document.rank]
        if newer:
            return Decision(waiting=f"{newer[0].name} holds the newer document {newer[0].document}")
        unheard = [n.member.name for n in view.nodes if n.status is None]
        if unheard and now < self._grace_ends:
            return Decision(push=push, waiting=f"not heard yet: {', '.join(unheard)}")
        if self._led_term != leadership.term:
            self._led_term = leadership.term
            self._own = {(p.pipeline, p.version) for p in document.plans if _runs(p, view.living)}
        return self._plan_all(view, leadership, document, push, now)

    def _plan_all(
        self, view: ClusterView, leadership: Leadership, document: ClusterDocument, push: tuple[int, ...], now: float
    ) -> Decision:
        version = _next_version(document, view.living)
        self._place.observe(view.living)
        plans, unplaced = self._place_missing(view, document, version)
        plans = self._improve(plans, view, _fit(view.living, _drained(document, view.living)), version, now)
        members = tuple(n.member for n in view.nodes)
        wanted = replace(document, plans=tuple(plans), members=members, term=leadership.term)
        torn = any(s.document == document.rank and s.document_hash != document.hash() for s in view.living)
        if wanted == document and not torn:
            return Decision(push=push, unplaced=unplaced)
        committed = replace(wanted, version=version)
        everybody = tuple(s.node_id for s in view.living if s.node_id != view.self_id)
        return Decision(commit=committed, push=everybody, unplaced=unplaced)

    def _place_missing(
        self, view: ClusterView, document: ClusterDocument, version: int
    ) -> tuple[list[Plan], tuple[tuple[str, str], ...]]:
        """The plans that go on, and new ones for what lacks one; with the reason for each model that gets none.

        Models that are there only as a fallback come last, and only while somebody needs them.
        """
        drained = _drained(document, view.living)
        fit = _fit(view.living, drained)
        able = [p for p in document.plans if p.model.id in self._models and self._keeps(p, view)]
        leaving = [p for p in able if any(stage.node_id in drained for stage in p.stages)]
        going_on = [p for p in able if p not in leaving]
        chosen: dict[str, list[Plan]] = {}
        unplaced: list[tuple[str, str]] = []
        for model_id, entry in sorted(self._models.items(), key=lambda item: item[1].serve == "fallback"):
            if entry.serve == "fallback" and not self._stands_in(model_id, chosen):
                continue
            chosen[model_id] = [p for p in going_on if p.model.id == model_id][: entry.replicas]
            missing = entry.replicas - len(chosen[model_id])
            if not missing:
                continue
            placed = [p for plans in chosen.values() for p in plans]
            kept = [*placed, *(p for p in going_on if p.model.id not in chosen)]
            try:
                new = self._place.place(model_id, entry, fit, version, kept)
            except (PlanError, UnsupportedModel) as error:
                # A drained node goes on while the others cannot hold what it holds.
                chosen[model_id] += [p for p in leaving if p.model.id == model_id][:missing]
                if not chosen[model_id]:
                    unplaced.append((model_id, str(error)))
                continue
            chosen[model_id] += new
            for plan in new:
                self._own.add((plan.pipeline, plan.version))
                self._weighed[plan.pipeline] = _holders(plan, fit)
        return [p for model_id in self._models for p in chosen.get(model_id, [])], tuple(unplaced)

    def _stands_in(self, model_id: str, chosen: Mapping[str, Sequence[Plan]]) -> bool:
        """Whether some model without a plan names this one as its fallback."""
        return any(
            entry.fallback_model == model_id and not chosen.get(other)
            for other, entry in self._models.items()
            if entry.serve == "always"
        )

    def _improve(
        self, plans: list[Plan], view: ClusterView, fit: tuple[NodeStatus, ...], version: int, now: float
    ) -> list[Plan]:
        """Since a plan was weighed a node has come, or got the model, or a manual split can be had again.

        At a quiet moment a better plan follows; a pipeline that does not come up is quiet, too.
        """
        settled = [p for s in view.living for p in s.pipelines if p.state in ("ready", "failed")]
        running = {p.plan.pipeline: p.running for p in settled}
        result: list[Plan] = []
        for plan in plans:
            entry = self._models[plan.model.id]
            known = self._weighed.setdefault(plan.pipeline, frozenset(s.node_id for s in plan.stages))
            holders = _holders(plan, fit)
            wanted = self._is_wanted(plan, view, fit)
            weighed = wanted and (holders <= known or entry.replicas > 1)
            if running.get(plan.pipeline) != 0 or weighed:
                self._quiet_since.pop(plan.pipeline, None)
                result.append(plan)
                continue
            if now - self._quiet_since.setdefault(plan.pipeline, now) < self._quiet_seconds:
                result.append(plan)
                continue
            self._weighed[plan.pipeline] = holders
            self._quiet_since.pop(plan.pipeline)
            if wanted:
                better = self._place.better(plan, entry, fit, version, plans)
            else:
                better = self._as_wanted(plan, entry, fit, version, plans)
            if better is not None:
                _log.info("a better plan", pipeline=plan.pipeline, version=version)
                self._own.add((better.pipeline, better.version))
            result.append(better or plan)
        return result

    def _as_wanted(
        self, plan: Plan, entry: ModelEntry, fit: tuple[NodeStatus, ...], version: int, plans: Sequence[Plan]
    ) -> Plan | None:
        others = [each for each in plans if each.pipeline != plan.pipeline]
        try:
            return self._place.place(plan.model.id, entry, fit, version, others)[0]
        except (PlanError, UnsupportedModel) as error:
            _log.warning("the manual split cannot be had", pipeline=plan.pipeline, reason=str(error))
            return None

    def _keeps(self, plan: Plan, view: ClusterView) -> bool:
        """Whether a plan can go on: it runs or was made by us, and all its nodes live."""
        if (plan.pipeline, plan.version) not in self._own:
            return False
        if any(view.is_dead(stage.node_id) for stage in plan.stages):
            return False
        if plan.num_stages > 1 and self._transport not in ("auto", plan.transport):
            return False
        for stage in plan.stages:
            node = view.node(stage.node_id)
            facts = node.status.model(plan.model.id) if node and node.status else None
            if facts is not None and facts.manifest_hash != plan.model.manifest_hash:
                return False
        return True

    def _is_wanted(self, plan: Plan, view: ClusterView, fit: Sequence[NodeStatus]) -> bool:
        """What the operator wants: not when a manual split could be had that this plan is not."""
        living = {s.node_id for s in fit}
        split = self._place.wanted_split(self._models[plan.model.id], living)
        holds = {stage.node_id: (stage.start, stage.end) for stage in plan.stages}
        can_split = bool(split) and all(
            node_id in living
            and (node := view.node(node_id)) is not None
            and node.state == "alive"
            and node.status is not None
            and node.status.model(plan.model.id) is not None
            for node_id in split
        )
        return not can_split or holds == dict(split)


def _holders(plan: Plan, fit: Iterable[NodeStatus]) -> frozenset[int]:
    """Those that could hold layers of this plan's model."""
    return frozenset(s.node_id for s in fit if s.model(plan.model.id) is not None)


def _drained(document: ClusterDocument, living: Iterable[NodeStatus]) -> frozenset[int]:
    """Nodes that the operator has drained, and those that have been told to end and wait until they are free.

    Nobody, when there is no other living node to move to: what runs then stays where it is.
    """
    living = tuple(living)
    named = frozenset(document.drained) | {s.node_id for s in living if s.draining}
    return named if any(s.node_id not in named for s in living) else frozenset()


def _fit(living: tuple[NodeStatus, ...], drained: frozenset[int]) -> tuple[NodeStatus, ...]:
    """Who may get work: the living that are not drained."""
    return tuple(s for s in living if s.node_id not in drained)


def _runs(plan: Plan, living: Iterable[NodeStatus]) -> bool:
    """Whether some living node still carries out this very plan."""
    return any(
        any(s.pipeline == plan.pipeline and s.epoch.version == plan.version for s in status.stages)
        or any(p.plan.pipeline == plan.pipeline and p.plan.version == plan.version for p in status.pipelines)
        for status in living
    )


def _next_version(document: ClusterDocument, living: Iterable[NodeStatus]) -> int:
    """Above every version anybody has named, so that a lost state directory cannot bring back an old epoch."""
    named = [document.version, *(p.version for p in document.plans)]
    for status in living:
        named += [status.document[2], *(epoch.version for _, epoch in status.epochs)]
    return max(named) + 1


def agreed_facts(model_id: str, nodes: Iterable[NodeStatus]) -> tuple[ModelFacts, tuple[NodeStatus, ...]]:
    """The model as most nodes know it (the lowest node id breaks ties), and the nodes that hold that very model.

    Raises ``PlanError`` when no living node can load it.
    """
    nodes = sorted(nodes, key=lambda s: s.node_id)
    holders: dict[str, list[NodeStatus]] = {}
    for status in nodes:
        facts = status.model(model_id)
        if facts is not None:
            holders.setdefault(facts.manifest_hash, []).append(status)
    if not holders:
        reasons = [f"{s.name}: {why}" for s in nodes for model, why in s.missing if model == model_id]
        raise PlanError(f"no living node can load {model_id}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    group = max(holders.values(), key=len)
    facts = group[0].model(model_id)
    assert facts is not None
    return facts, tuple(group)


def available_bytes(status: NodeStatus, pipeline: str, nodes: Iterable[NodeStatus]) -> int:
    """Memory a new stage of ``pipeline`` may take on this node.

    What its present stage of the same pipeline holds comes back; nodes that share a machine share its free memory, but
    a node's budget is its own.
    """
    sharing = max(1, sum(1 for s in nodes if s.machine == status.machine))
    own = sum(stage.memory_bytes for stage in status.stages if stage.pipeline == pipeline)
    machine = status.memory_free_bytes if status.machine_free_bytes is None else status.machine_free_bytes
    return min(status.memory_total_bytes, min(status.memory_free_bytes, machine // sharing) + own)


async def push(
    document: ClusterDocument,
    targets: Iterable[int],
    put: Callable[[int, ClusterDocument], Awaitable[None]],
) -> None:
    """Send the document to the targets at once; whoever does not take it is asked again at the next heartbeat."""

    async def one(node_id: int) -> None:
        try:
            await put(node_id, document)
        except ClusterError as error:
            _log.warning("document not taken", node=node_id, rank=document.rank, code=error.code, reason=str(error))

    await asyncio.gather(*(one(node_id) for node_id in targets))
