from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_cluster.cluster.status import NodeStatus, PipelineState, PipelineStatus
from mlx_cluster.metrics import Metrics
from mlx_cluster.node.history import History
from mlx_cluster.node.recoveries import PLANNED_ANEW, PipelineWatch
from mlx_cluster.plan import Epoch
from tests.unit.cluster.builders import plan, status, view

KILLED = "stage 1 (layers 3…5) on node 1: killed by signal 9"


def says(state: PipelineState, version: int, incarnation: int, detail: str = "", first: int = 0) -> PipelineStatus:
    """Node ``first`` and the one behind it hold three layers each."""
    wanted = plan({first: 3, first + 1: 3}, version=version)
    return PipelineStatus(wanted, Epoch(version, incarnation), state, detail)


READY = says("ready", 1, 1)


class Cluster:
    """Nodes 0 … 3, each looking at what all of them say, second by second."""

    def __init__(self) -> None:
        self.boots = dict.fromkeys(range(4), "first")
        self.now = 100.0
        self.watches: dict[int, PipelineWatch] = {}
        self.told: dict[int, History] = {}
        for node_id in range(4):
            self.restart(node_id, "first")

    def restart(self, node_id: int, boot: str) -> None:
        self.boots[node_id] = boot
        self.told[node_id] = History(Metrics().cluster, wall=lambda: self.now)
        self.watches[node_id] = PipelineWatch(self.told[node_id])

    def look(
        self,
        words: Mapping[int, PipelineStatus] | None = None,
        dead: frozenset[int] = frozenset(),
        **changes: Any,
    ) -> None:
        """Each living node looks, while ``words`` are said by these drivers; ``changes`` are of node 1's status."""
        self.now += 1.0
        words = words or {}
        statuses: dict[int, NodeStatus | None] = {
            node_id: status(
                node_id,
                boot=boot,
                pipelines=(words[node_id],) if node_id in words else (),
                **(changes if node_id == 1 else {}),
            )
            for node_id, boot in self.boots.items()
        }
        for node_id, watch in self.watches.items():
            if node_id not in dead:
                own = (words[node_id],) if node_id in words else ()
                watch.look(view(node_id, statuses, dead), own, self.now)

    def recoveries(self) -> list[tuple[int, str, str, float]]:
        """(who told, epoch, cause, seconds)"""
        return [(node, r.epoch, r.cause, r.seconds) for node, told in self.told.items() for r in told.recoveries]

    def transitions(self, node_id: int) -> list[tuple[str, float, str, str]]:
        """Oldest first: (kind, at, epoch, cause)."""
        rows = self.told[node_id].to_json()["transitions"]
        return [(t["kind"], t["at"], t["epoch"], t["cause"]) for t in reversed(rows)]


def test_a_killed_stage_is_told_by_the_driver_that_stays_and_its_loss_by_everybody() -> None:
    cluster = Cluster()
    cluster.look({0: says("loading", 1, 1, "starting the stages")})
    cluster.look({0: READY})
    cluster.look({0: says("loading", 1, 1, KILLED)})
    cluster.look({0: says("loading", 1, 2, "starting the stages")})
    cluster.look({0: says("failed", 1, 2, "no memory")})
    cluster.look({0: says("loading", 1, 3, "linking the stages (grpc)")})
    cluster.look({0: says("ready", 1, 3)})
    cluster.look({0: says("ready", 1, 3)})
    assert cluster.recoveries() == [(0, "1.3", KILLED, 4.0)]
    assert cluster.transitions(0) == [("pipeline_lost", 103.0, "1.1", KILLED), ("recovery", 107.0, "1.3", KILLED)]
    for other in (1, 2, 3):
        assert cluster.transitions(other) == [("pipeline_lost", 103.0, "1.1", KILLED)]


def test_the_first_bring_up_is_no_recovery_and_every_loss_is_one() -> None:
    cluster = Cluster()
    cluster.look({0: says("loading", 1, 1)})
    assert not cluster.watches[1].has_served("tiny")
    cluster.look({0: READY})
    assert cluster.recoveries() == []
    assert cluster.watches[1].has_served("tiny")
    for incarnation in (2, 3):
        cluster.look({0: says("loading", 1, incarnation - 1, f"loss {incarnation - 1}")})
        cluster.look({0: says("ready", 1, incarnation)})
    assert cluster.recoveries() == [(0, "1.2", "loss 1", 1.0), (0, "1.3", "loss 2", 1.0)]


def test_a_loss_and_a_return_between_two_looks_are_not_missed() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.look({0: says("ready", 1, 2)})
    assert cluster.recoveries() == [(0, "1.2", PLANNED_ANEW, 0.0)]


def test_who_missed_the_beat_between_two_epochs_learns_the_cause_from_the_newer_one() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.look({0: replace(says("loading", 1, 2, "starting the stages"), lost=KILLED)})
    assert cluster.transitions(2) == [("pipeline_lost", 102.0, "1.1", KILLED)]
    cluster.look({0: replace(says("ready", 1, 2), lost=KILLED)})
    assert cluster.recoveries() == [(0, "1.2", KILLED, 1.0)]
    # A plan of another version tells its own story: what it once lost is not why it took over.
    cluster.look({2: replace(says("loading", 2, 2, "starting the stages", first=2), lost="its own")})
    assert cluster.transitions(3)[-1] == ("pipeline_lost", 104.0, "1.2", PLANNED_ANEW)


def test_the_new_driver_tells_of_the_death_of_the_old_one() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.look({0: READY}, dead=frozenset({0}))
    cluster.look({0: READY, 1: says("loading", 2, 0, "not started yet", first=1)}, dead=frozenset({0}))
    cluster.look({0: READY, 1: says("ready", 2, 1, first=1)}, dead=frozenset({0}))
    assert cluster.recoveries() == [(1, "2.1", "mini0 is dead (silent)", 2.0)]
    assert cluster.transitions(2) == [("pipeline_lost", 102.0, "1.1", "mini0 is dead (silent)")]


def test_a_stage_node_that_dies_is_the_cause_also_where_the_new_plan_is_known_first() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.look({0: says("loading", 2, 0, "not started yet", first=2)}, dead=frozenset({1}))
    cluster.look({2: says("ready", 2, 1, first=2)}, dead=frozenset({1}))
    assert cluster.recoveries() == [(2, "2.1", "mini1 is dead (silent)", 1.0)]


def test_what_drains_or_leaves_and_what_is_only_planned_anew_are_causes_too() -> None:
    for changes, cause in (
        ({"draining": True}, "mini1 drains"),
        ({"leaving": True}, "mini1 has left"),
        ({}, PLANNED_ANEW),
    ):
        cluster = Cluster()
        cluster.look({0: READY})
        cluster.look({2: says("loading", 2, 1, "starting the stages", first=2)}, **changes)
        cluster.look({2: says("ready", 2, 1, first=2)}, **changes)
        assert cluster.recoveries() == [(2, "2.1", cause, 1.0)]


def test_a_driver_that_starts_anew_at_once_knows_nothing_so_another_tells() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.restart(0, "second")
    cluster.look()
    cluster.look({0: says("loading", 1, 2)})
    cluster.look({0: says("ready", 1, 2)})
    assert cluster.recoveries() == [(1, "1.2", "mini0 was started again", 2.0)]
    cluster.look({0: says("loading", 1, 2, KILLED)})
    cluster.look({0: says("ready", 1, 3)})
    assert cluster.recoveries() == [(0, "1.3", KILLED, 1.0), (1, "1.2", "mini0 was started again", 2.0)]


def test_who_was_only_out_of_sight_has_not_recovered() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.look({0: READY}, dead=frozenset({0}))
    cluster.look({0: READY})
    assert [kind for kind, *_ in cluster.transitions(1)] == ["pipeline_lost", "pipeline_back"]
    assert cluster.recoveries() == []
    cluster.look({0: says("loading", 1, 1, KILLED)})
    cluster.look({0: says("ready", 1, 2)})
    assert cluster.recoveries() == [(0, "1.2", KILLED, 1.0)], "the time before does not count"


def test_a_revived_driver_of_an_older_epoch_ends_no_loss() -> None:
    cluster = Cluster()
    cluster.look({0: READY})
    cluster.look({2: says("ready", 2, 1, first=2)}, dead=frozenset({0}))
    cluster.look({0: READY}, dead=frozenset({2}))
    assert [kind for kind, *_ in cluster.transitions(1)] == ["pipeline_lost", "pipeline_lost"]
    cluster.look({1: says("ready", 3, 1, first=1)}, dead=frozenset({2}))
    assert cluster.recoveries()[0] == (1, "3.1", "mini2 is dead (silent)", 1.0)


def test_two_pipelines_are_two_stories() -> None:
    told = History(Metrics().cluster, wall=lambda: 0.0)
    watch = PipelineWatch(told)
    pair = tuple(PipelineStatus(plan({0: 3}, pipeline=name), Epoch(1, 1), "ready") for name in ("tiny", "large"))
    nodes = view(0, {0: status(0)})
    watch.look(nodes, pair, 1.0)
    lost = PipelineStatus(pair[0].plan, Epoch(1, 1), "loading", "gone")
    watch.look(nodes, (lost, pair[1]), 2.0)
    watch.look(nodes, pair[1:], 3.0)
    assert [(t["pipeline"], t["cause"]) for t in told.to_json()["transitions"]] == [("tiny", "gone")]
