from __future__ import annotations

from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.metrics import Metrics
from mlx_cluster.node.history import MAX_TRANSITIONS, History
from mlx_cluster.node.watch import NodeWatch
from mlx_cluster.node.word import health
from tests.unit.cluster.builders import status, view


def history() -> tuple[Metrics, History]:
    metrics = Metrics()
    return metrics, History(metrics.cluster, wall=lambda: 77.0)


def kinds(told: History) -> list[str]:
    return [t["kind"] for t in told.to_json()["transitions"]]


def test_each_transition_is_one_row_and_one_count_and_rows_are_bounded() -> None:
    metrics, told = history()
    for term in range(MAX_TRANSITIONS + 5):
        told.elected(1, "mini1", term, 0.5, "elected after the loss of mini0")
    assert len(told.to_json()["transitions"]) == MAX_TRANSITIONS
    assert told.to_json()["elections"][0]["term"] == MAX_TRANSITIONS + 4
    text = metrics.render().decode()
    assert f'mlx_cluster_transitions_total{{kind="coordinator_elected"}} {MAX_TRANSITIONS + 5}.0' in text


def test_a_recovery_stands_in_the_nodes_status_and_in_a_histogram() -> None:
    metrics, told = history()
    told.recovered("tiny", "3.2", "stage 1 on mini2 died", 1.25)
    (recovery,) = told.recoveries
    assert (recovery.pipeline, recovery.epoch, recovery.seconds, recovery.at) == ("tiny", "3.2", 1.25, 77.0)
    assert NodeStatus.from_json(status(0, recoveries=(recovery,)).to_json()).recoveries == (recovery,)
    assert 'mlx_cluster_recovery_seconds_bucket{le="2.0"} 1.0' in metrics.render().decode()


def test_nodes_that_come_die_return_and_leave_are_news_once() -> None:
    metrics, told = history()
    watch = NodeWatch(told, metrics.cluster)
    both: dict[int, NodeStatus | None] = {0: status(0), 1: status(1)}
    assert watch.look(view(0, both))
    assert not watch.look(view(0, both))
    assert watch.look(view(0, both, dead=frozenset({1})))
    assert watch.look(view(0, {**both, 1: status(1, boot="second")}))
    left = status(1, boot="second", sequence=9, leaving=True)
    assert watch.look(view(0, {**both, 1: left}, dead=frozenset({1})))
    assert kinds(told) == ["node_left", "node_alive", "node_dead", "node_alive", "node_alive"]
    assert 'mlx_cluster_nodes{state="dead"} 1.0' in metrics.render().decode()


def test_health_is_the_worst_of_what_is_wrong() -> None:
    assert health(0.0, 0.5, 0, 2) == 1.0
    assert health(0.6, 0.5, 0, 2) == 0.4
    assert health(0.0, 0.01, 0, 2) == 0.2
    assert health(0.0, 0.5, 1, 2) == 0.8
    assert health(9.0, 0.0, 2, 2) == 0.0
