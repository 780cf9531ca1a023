from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cluster.cluster.coordinator import Coordinator, Decision, agreed_facts, available_bytes, push
from mlx_cluster.cluster.document import ClusterDocument, accept
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.membership import Membership
from mlx_cluster.cluster.status import NodeStatus, PipelineState, PipelineStatus, StageStatus
from mlx_cluster.config.schema import ModelEntry
from mlx_cluster.errors import Fenced, PlanError
from mlx_cluster.plan import Epoch, ModelRef, Plan, even_counts
from tests.unit.cluster.builders import GIB, VERSION, facts, members, plan, status, view
from tests.unit.cluster.lowest_live import LowestLiveNode

LED = Leadership(0, 1)
QUIET_SECONDS = 5.0


class EvenPlacer:
    """Layers as even as possible over the nodes that hold the model; a manual split when all of it can be held."""

    def __init__(self, split: Mapping[int, tuple[int, int]] | None = None, capacity: int = 99) -> None:
        self.split, self.capacity = split or {}, capacity
        self.observed = 0

    def wanted_split(self, entry: ModelEntry, living: Container[int]) -> Mapping[int, tuple[int, int]]:
        return self.split

    def observe(self, nodes: Iterable[NodeStatus]) -> None:
        self.observed += 1

    def place(
        self, model_id: str, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int, kept: Sequence[Plan]
    ) -> tuple[Plan, ...]:
        known, holders = agreed_facts(model_id, nodes)
        ids = sorted(s.node_id for s in holders)
        if self.split and set(self.split) <= set(ids):
            counts = {i: end - start for i, (start, end) in self.split.items()}
        else:
            counts = dict(zip(ids, even_counts(known.num_layers, len(ids)), strict=True))
        if max(counts.values()) > self.capacity:
            raise PlanError(f"{max(counts.values()) - self.capacity} layers too many")
        taken = {p.pipeline for p in kept}
        names = [name for name in (model_id, *(f"{model_id}#{n}" for n in (2, 3))) if name not in taken]
        return tuple(
            replace(plan(counts, version, name, known.manifest_hash), model=ModelRef(model_id, known.manifest_hash, 6))
            for name in names[: entry.replicas - sum(p.model.id == model_id for p in kept)]
        )

    def better(
        self, plan: Plan, entry: ModelEntry, nodes: tuple[NodeStatus, ...], version: int, kept: Sequence[Plan]
    ) -> Plan | None:
        (best,) = self.place(plan.model.id, entry, nodes, version, [])
        return best if best.num_stages > plan.num_stages else None


def coordinator(placer: EvenPlacer | None = None, transport: str = "auto") -> Coordinator:
    return Coordinator(
        {"tiny": ModelEntry()}, placer or EvenPlacer(), transport, 0.0, grace_seconds=20.0, quiet_seconds=QUIET_SECONDS
    )


EMPTY = ClusterDocument("c")
THREE: dict[int, NodeStatus | None] = {i: status(i) for i in range(3)}


def committed(decision: Decision) -> ClusterDocument:
    assert decision.commit is not None, decision
    return decision.commit


def told(document: ClusterDocument, statuses: Mapping[int, NodeStatus | None]) -> dict[int, NodeStatus | None]:
    """The same nodes after they have taken the document."""
    return {
        i: replace(s, document=document.rank, document_hash=document.hash()) if s else None for i, s in statuses.items()
    }


def test_it_waits_for_all_configured_nodes_then_plans_and_pushes() -> None:
    deciding = coordinator()
    waiting = deciding.decide(view(0, {**THREE, 2: None}), LED, EMPTY, now=1.0)
    assert waiting.commit is None
    assert waiting.waiting == "not heard yet: mini2"
    decision = deciding.decide(view(0, THREE), LED, EMPTY, now=2.0)
    document = committed(decision)
    assert [(s.node_id, s.start, s.end) for s in document.plans[0].stages] == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]
    assert (document.rank, document.plans[0].version) == ((0, 1, 1), 1)
    assert [m.name for m in document.members] == ["mini0", "mini1", "mini2"]
    assert decision.push == (1, 2)


def test_after_the_grace_period_it_plans_over_those_who_came() -> None:
    decision = coordinator().decide(view(0, {**THREE, 2: None}), LED, EMPTY, now=20.0)
    assert [s.node_id for s in committed(decision).plans[0].stages] == [0, 1]


def test_a_plan_that_runs_is_left_alone_and_whoever_lacks_the_document_gets_it_again() -> None:
    deciding = coordinator()
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    statuses = told(document, THREE)
    assert deciding.decide(view(0, statuses), LED, document, now=3.0) == Decision()
    assert deciding.decide(view(0, {**statuses, 2: status(2)}), LED, document, now=4.0) == Decision(push=(2,))


def test_a_dead_node_of_the_plan_means_a_plan_over_the_survivors() -> None:
    deciding = coordinator()
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    later = committed(deciding.decide(view(0, told(document, THREE), dead=frozenset({1})), LED, document, now=3.0))
    assert [(s.node_id, s.start, s.end) for s in later.plans[0].stages] == [(0, 0, 3), (2, 3, 6)]
    assert later.rank > document.rank
    assert later.plans[0].version > document.plans[0].version


def serving(
    document: ClusterDocument, running: int, driver: int = 0, state: PipelineState = "ready"
) -> dict[int, NodeStatus | None]:
    """Told, and node ``driver`` drives every plan that begins there."""
    statuses = told(document, THREE)
    now = statuses[driver]
    assert now is not None
    driven = tuple(
        PipelineStatus(p, Epoch(p.version, 1), state, running=running)
        for p in document.plans
        if p.engine_node_id == driver
    )
    statuses[driver] = replace(now, pipelines=driven)
    return statuses


def test_a_node_that_returns_is_used_again_at_a_quiet_moment() -> None:
    deciding = coordinator()
    first = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    two = committed(deciding.decide(view(0, told(first, THREE), dead=frozenset({1})), LED, first, now=3.0))
    for now in (10.0, 20.0):
        assert deciding.decide(view(0, serving(two, running=1)), LED, two, now=now).commit is None, "it is at work"
    assert deciding.decide(view(0, serving(two, running=0)), LED, two, now=21.0).commit is None, "quiet for no time"
    three = committed(deciding.decide(view(0, serving(two, running=0)), LED, two, now=21.0 + QUIET_SECONDS))
    assert [s.node_id for s in three.plans[0].stages] == [0, 1, 2]
    assert three.plans[0].version > two.plans[0].version
    assert deciding.decide(view(0, serving(three, running=0)), LED, three, now=90.0).commit is None


def test_a_pipeline_that_does_not_come_up_is_moved_when_a_node_is_back() -> None:
    for placer in (EvenPlacer(), EvenPlacer({0: (0, 4), 1: (4, 5), 2: (5, 6)})):
        deciding = coordinator(placer)
        first = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
        two = committed(deciding.decide(view(0, told(first, THREE), dead=frozenset({1})), LED, first, now=3.0))
        for state, now in (("loading", 10.0), ("failed", 11.0)):
            assert deciding.decide(view(0, serving(two, 0, state=state)), LED, two, now=now).commit is None
        failed = serving(two, 0, state="failed")
        back = committed(deciding.decide(view(0, failed), LED, two, now=11.0 + QUIET_SECONDS))
        assert [s.node_id for s in back.plans[0].stages] == [0, 1, 2]


def test_a_manual_split_is_taken_up_again_at_a_quiet_moment() -> None:
    split = {0: (0, 4), 1: (4, 5), 2: (5, 6)}
    placer = EvenPlacer(split)
    deciding = coordinator(placer)
    first = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    assert [(s.start, s.end) for s in first.plans[0].stages] == list(split.values())
    two = committed(deciding.decide(view(0, told(first, THREE), dead=frozenset({1})), LED, first, now=3.0))
    assert [s.node_id for s in two.plans[0].stages] == [0, 2]
    assert deciding.decide(view(0, serving(two, running=1)), LED, two, now=10.0).commit is None, "it is at work"
    assert deciding.decide(view(0, serving(two, running=0)), LED, two, now=11.0).commit is None, "quiet for no time"
    placer.capacity = 3
    quiet = 11.0 + QUIET_SECONDS
    assert deciding.decide(view(0, serving(two, running=0)), LED, two, now=quiet).commit is None, "it cannot be had"
    placer.capacity = 99
    assert deciding.decide(view(0, serving(two, running=0)), LED, two, now=quiet + 1.0).commit is None
    back = committed(deciding.decide(view(0, serving(two, running=0)), LED, two, now=quiet + 1.0 + QUIET_SECONDS))
    assert [(s.start, s.end) for s in back.plans[0].stages] == list(split.values())
    assert deciding.decide(view(0, serving(back, running=0)), LED, back, now=90.0).commit is None


def test_lost_replicas_are_made_again_and_the_others_go_on() -> None:
    deciding = Coordinator({"tiny": ModelEntry(replicas=2)}, EvenPlacer(), "auto", 0.0, 20.0)
    first = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    assert [p.pipeline for p in first.plans] == ["tiny", "tiny#2"]
    fewer = replace(first, plans=first.plans[1:])
    later = committed(deciding.decide(view(0, told(fewer, THREE)), LED, fewer, now=3.0))
    assert [p.pipeline for p in later.plans] == ["tiny#2", "tiny"]
    assert later.plans[0] == first.plans[1], "the replica that lived was not touched"


def test_a_fallback_is_placed_only_while_somebody_needs_it() -> None:
    class Picky(EvenPlacer):
        def place(self, model_id: str, *rest: Any) -> tuple[Plan, ...]:
            if model_id == "big" and self.capacity < 10:
                raise PlanError("too big")
            return super().place("tiny", *rest)

    models = {"tiny": ModelEntry(serve="fallback"), "big": ModelEntry(fallback_model="tiny")}
    placer = Picky(capacity=3)
    deciding = Coordinator(models, placer, "auto", 0.0, 20.0)
    small = deciding.decide(view(0, THREE), LED, EMPTY, now=2.0)
    assert [p.pipeline for p in committed(small).plans] == ["tiny"]
    assert small.unplaced == (("big", "too big"),)


def test_what_does_not_fit_is_said_and_the_old_plan_ends() -> None:
    deciding = coordinator(EvenPlacer(capacity=2))
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    decision = deciding.decide(view(0, told(document, THREE), dead=frozenset({1})), LED, document, now=3.0)
    assert committed(decision).plans == ()
    assert decision.unplaced == (("tiny", "1 layers too many"),)
    again = deciding.decide(
        view(0, told(committed(decision), THREE), dead=frozenset({1})), LED, committed(decision), now=4.0
    )
    assert again.commit is None, "the same refusal is not committed every second"


def test_a_follower_pushes_only_to_a_leader_that_lacks_the_document() -> None:
    document = ClusterDocument("c", 3, 4, tuple(members(3)), (plan({0: 3, 1: 3}, 4),))
    statuses = told(document, THREE)
    follower = coordinator()
    table = view(1, {**statuses, 0: status(0), 2: status(2)})
    assert follower.decide(table, Leadership(0, 3), document, now=1.0) == Decision(push=(0,))


def test_a_leader_waits_for_a_newer_document_instead_of_overruling_it() -> None:
    statuses = {**THREE, 2: status(2, document=(0, 5, 5))}
    decision = coordinator().decide(view(0, statuses), Leadership(0, 6), EMPTY, now=99.0)
    assert decision.commit is None
    assert "mini2 holds the newer document (0, 5, 5)" in decision.waiting


def running(document: ClusterDocument) -> dict[int, NodeStatus | None]:
    placed = document.plans[0]
    statuses = told(document, THREE)
    for stage in placed.stages:
        now = statuses[stage.node_id]
        assert now is not None
        word = StageStatus("tiny", Epoch(placed.version, 1), stage.index, stage.start, stage.end, 7, "linked")
        statuses[stage.node_id] = replace(now, stages=(word,))
    return statuses


def test_a_new_coordinator_adopts_what_runs_under_its_own_term() -> None:
    old = ClusterDocument("c", 1, 4, tuple(members(3)), (plan({1: 1, 2: 5}, 4),))
    successor = coordinator()
    decision = successor.decide(view(1, running(old), dead=frozenset({0})), Leadership(1, 2), old, now=99.0)
    document = committed(decision)
    assert document.plans == old.plans
    assert document.rank == (0, 2, 5)
    assert decision.push == (2,)


def test_a_plan_of_an_earlier_life_that_nobody_runs_is_made_anew() -> None:
    old = ClusterDocument("c", 1, 4, tuple(members(3)), (plan({1: 1, 2: 5}, 4),))
    decision = coordinator().decide(view(0, told(old, THREE)), Leadership(0, 2), old, now=2.0)
    assert [s.node_id for s in committed(decision).plans[0].stages] == [0, 1, 2]
    assert committed(decision).plans[0].version == 5


def test_a_lost_state_directory_does_not_bring_back_an_old_epoch() -> None:
    statuses = {**THREE, 1: status(1, epochs=(("tiny", Epoch(41, 7)),))}
    assert committed(coordinator().decide(view(0, statuses), LED, EMPTY, now=2.0)).plans[0].version == 42


def test_two_documents_of_one_rank_are_healed_by_a_newer_one() -> None:
    deciding = coordinator()
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    statuses = told(document, THREE)
    statuses[2] = status(2, document=document.rank, document_hash="another")
    healed = committed(deciding.decide(view(0, statuses), LED, document, now=3.0))
    assert healed.plans == document.plans
    assert healed.rank > document.rank


def test_another_transport_or_another_manifest_asks_for_a_new_plan() -> None:
    deciding = coordinator(transport="grpc")
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    changed = {i: replace(s, models=(facts(manifest_hash="m2"),)) for i, s in told(document, THREE).items() if s}
    later = committed(deciding.decide(view(0, dict(changed)), LED, document, now=3.0))
    assert later.plans[0].model.manifest_hash == "m2"


def test_the_driver_counts_as_running_too() -> None:
    old = ClusterDocument("c", 1, 4, tuple(members(3)), (plan({1: 1, 2: 5}, 4),))
    statuses = told(old, THREE)
    driver = statuses[1]
    assert driver is not None
    statuses[1] = replace(driver, pipelines=(PipelineStatus(old.plans[0], Epoch(4, 1), "loading"),))
    assert committed(coordinator().decide(view(0, statuses), Leadership(0, 2), old, now=2.0)).plans == old.plans


def test_the_model_is_what_most_nodes_hold() -> None:
    nodes = [status(0, models=(facts(manifest_hash="odd"),)), status(1), status(2)]
    known, holders = agreed_facts("tiny", nodes)
    assert (known.manifest_hash, [s.node_id for s in holders]) == ("m1", [1, 2])
    nodes = [status(0, models=(), missing=(("tiny", "no such folder"),))]
    with pytest.raises(PlanError, match=r"no living node can load tiny \(mini0: no such folder\)"):
        agreed_facts("tiny", nodes)


def test_nodes_that_share_a_machine_share_its_memory() -> None:
    own = StageStatus("tiny", Epoch(1, 1), 0, 0, 3, 7, "linked", memory_bytes=GIB)
    nodes = [status(0, machine="m", stages=(own,)), status(1, machine="m"), status(2)]
    assert available_bytes(nodes[0], "tiny", nodes) == 2 * GIB + GIB
    assert available_bytes(nodes[1], "tiny", nodes) == 2 * GIB
    assert available_bytes(nodes[2], "tiny", nodes) == 4 * GIB
    budgeted = replace(nodes[1], memory_free_bytes=GIB, machine_free_bytes=4 * GIB)
    assert available_bytes(budgeted, "tiny", nodes) == GIB, "what a budget leaves is not shared"
    short = replace(budgeted, machine_free_bytes=GIB)
    assert available_bytes(short, "tiny", nodes) == GIB // 2


async def test_one_refusal_does_not_stop_a_push_to_the_others() -> None:
    taken: list[int] = []

    async def put(node_id: int, document: ClusterDocument) -> None:
        if node_id == 1:
            raise Fenced("newer here")
        taken.append(node_id)

    await push(EMPTY, [0, 1, 2], put)
    assert taken == [0, 2]


class Simulated:
    """Agents with the real table, leader choice, coordinator and document rule; words and deaths come from a trace."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.now = 0.0
        self.boots = [0] * count
        self.up = [True] * count
        self.documents = [EMPTY] * count
        self.terms = [0] * count
        self.sequences = [0] * count
        for node in range(count):
            self.boot(node)

    def boot(self, node: int) -> None:
        if not hasattr(self, "tables"):
            self.tables: dict[int, Membership] = {}
            self.choices: dict[int, LowestLiveNode] = {}
            self.deciders: dict[int, Coordinator] = {}
        self.boots[node] += 1
        self.sequences[node] = 0
        self.up[node] = True
        self.tables[node] = Membership(node, members(self.count), VERSION, 1.0, 3, self.now)
        self.choices[node] = LowestLiveNode(node, self.documents[node].term)
        self.deciders[node] = Coordinator({"tiny": ModelEntry()}, EvenPlacer(), "auto", self.now, grace_seconds=5.0)

    def status(self, node: int) -> NodeStatus:
        self.sequences[node] += 1
        document = self.documents[node]
        stages: tuple[Any, ...] = tuple(
            StageStatus("tiny", Epoch(p.version, 1), s.index, s.start, s.end, 7, "linked")
            for p in document.plans
            for s in p.stages
            if s.node_id == node
        )
        return status(
            node,
            self.sequences[node],
            f"{node}-{self.boots[node]}",
            term=self.terms[node],
            document=document.rank,
            document_hash=document.hash(),
            stages=stages,
        )

    def second(self, cut: frozenset[int]) -> None:
        """One heartbeat of everybody; nodes in ``cut`` hear and are heard only among themselves."""
        self.now += 1.0
        for node in range(self.count):
            if not self.up[node]:
                continue
            word = self.status(node)
            for other in range(self.count):
                if self.up[other] and (node in cut) == (other in cut):
                    self.tables[other].heard(word, self.now)
        for node in range(self.count):
            if self.up[node]:
                self.act(node, cut)

    def act(self, node: int, cut: frozenset[int]) -> None:
        table = self.tables[node].tick(self.now)
        leadership = self.choices[node].observe(table)
        self.terms[node] = leadership.term
        decision = self.deciders[node].decide(table, leadership, self.documents[node], self.now)
        if decision.commit is not None:
            assert decision.commit.rank > self.documents[node].rank
            self.documents[node] = accept(self.documents[node], decision.commit)
        for other in decision.push:
            if self.up[other] and (node in cut) == (other in cut):
                before = self.documents[other]
                try:
                    self.documents[other] = accept(before, self.documents[node])
                except Fenced:
                    assert self.documents[node].rank <= before.rank


events = st.one_of(
    st.tuples(st.just("kill"), st.integers(0, 2)),
    st.tuples(st.just("boot"), st.integers(0, 2)),
    st.tuples(st.just("cut"), st.integers(0, 3)),
    st.tuples(st.just("pass"), st.integers(1, 6)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=14))
def test_whatever_happens_the_living_end_with_one_plan_over_living_nodes(trace: list[tuple[str, int]]) -> None:
    world = Simulated(3)
    cut: frozenset[int] = frozenset()
    for what, value in trace:
        if what == "kill" and sum(world.up) > 1:
            world.up[value] = False
        elif what == "boot" and not world.up[value]:
            world.boot(value)
        elif what == "cut":
            cut = frozenset({value}) if value < 3 else frozenset()
        else:
            for _ in range(value):
                world.second(cut)
    for _ in range(14):
        world.second(frozenset())
    living = [node for node in range(3) if world.up[node]]
    documents = [world.documents[node] for node in living]
    assert all(document == documents[0] for document in documents), [d.rank for d in documents]
    assert len(documents[0].plans) == 1
    assert {stage.node_id for stage in documents[0].plans[0].stages} <= set(living)
    settled = documents[0]
    for _ in range(3):
        world.second(frozenset())
    assert world.documents[living[0]] == settled, "nothing changes when nothing happens"


def test_a_drained_node_loses_its_layers_and_gets_none_until_it_is_undrained() -> None:
    deciding = coordinator()
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    drained = replace(document, drained=(1,), version=document.version + 1)
    moved = committed(deciding.decide(view(0, told(drained, THREE)), LED, drained, now=3.0))
    assert [s.node_id for s in moved.plans[0].stages] == [0, 2]
    assert moved.drained == (1,)
    again = deciding.decide(view(0, told(moved, THREE)), LED, moved, now=4.0)
    assert again.commit is None


def test_a_drained_node_goes_on_while_the_others_cannot_hold_its_layers() -> None:
    deciding = coordinator(EvenPlacer(capacity=2))
    document = committed(deciding.decide(view(0, THREE), LED, EMPTY, now=2.0))
    drained = replace(document, drained=(1,), version=document.version + 1)
    assert deciding.decide(view(0, told(drained, THREE)), LED, drained, now=3.0).commit is None


def test_a_node_that_drains_gets_nothing_and_what_it_holds_moves() -> None:
    made = coordinator()
    document = committed(made.decide(view(0, THREE), LED, EMPTY, 1.0))
    nodes = told(document, THREE)
    draining = {**nodes, 1: replace(nodes[1], draining=True)}  # type: ignore[type-var]
    moved = committed(made.decide(view(0, draining), LED, document, 2.0))
    assert [stage.node_id for stage in moved.plans[0].stages] == [0, 2]
    assert moved.drained == (), "that is the operator's list"
    assert made.decide(view(0, told(moved, draining)), LED, moved, 3.0).commit is None


def test_what_only_draining_nodes_can_hold_stays_where_it_is() -> None:
    made = coordinator(EvenPlacer(capacity=2))
    document = committed(made.decide(view(0, THREE), LED, EMPTY, 1.0))
    draining = told(document, THREE)
    draining = {**draining, 1: replace(draining[1], draining=True)}  # type: ignore[type-var]
    assert made.decide(view(0, draining), LED, document, 2.0).commit is None


def test_where_everybody_drains_nothing_moves_any_more() -> None:
    """As when all nodes are told to end at once: a new plan would cut the streams that they wait for."""
    made = coordinator()
    document = committed(made.decide(view(0, THREE), LED, EMPTY, 1.0))
    nodes = told(document, THREE)
    draining = {i: replace(node, draining=True) for i, node in nodes.items()}  # type: ignore[type-var]
    for now in (2.0, 3.0):
        assert made.decide(view(0, draining), LED, document, now).commit is None
    drained = replace(document, drained=(0, 1, 2), version=document.version + 1)
    assert made.decide(view(0, told(drained, THREE)), LED, drained, 4.0).commit is None
    blank = {i: replace(node, draining=True) for i, node in told(EMPTY, THREE).items()}  # type: ignore[type-var]
    assert coordinator().decide(view(0, blank), LED, EMPTY, 1.0).commit is not None, "a model without a plan gets one"
