from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.membership import Membership
from mlx_cluster.cluster.status import ModelFacts, NodeStatus, PipelineStatus, StageStatus
from mlx_cluster.errors import ConfigError, Fenced
from mlx_cluster.plan import Epoch
from tests.unit.cluster.builders import VERSION, members, plan, status


def table(now: float = 0.0, threshold: int = 3) -> Membership:
    membership = Membership(0, members(3), VERSION, interval_seconds=1.0, failure_threshold=threshold, now=now)
    membership.heard(status(0), now)
    return membership


def states(membership: Membership, now: float) -> list[str]:
    return [node.state for node in membership.tick(now).nodes]


def test_a_node_goes_from_unheard_to_alive_to_suspect_to_dead_and_back() -> None:
    membership = table()
    assert states(membership, 0.5) == ["alive", "dead", "dead"]
    assert membership.view(0.5).nodes[1].detail == "not heard yet"
    membership.heard(status(1), 1.0)
    assert states(membership, 2.0) == ["alive", "alive", "dead"]
    assert states(membership, 3.5) == ["alive", "suspect", "dead"]
    assert membership.view(3.5).nodes[1].detail == "silent for 2.5 s"
    assert states(membership, 4.1) == ["alive", "dead", "dead"]
    membership.heard(status(1, sequence=2), 4.2)
    assert states(membership, 4.3) == ["alive", "alive", "dead"]


def test_a_suspect_still_counts_as_living() -> None:
    membership = table()
    membership.heard(status(1), 0.0)
    assert [s.node_id for s in membership.view(2.5).living] == [0, 1]
    assert [s.node_id for s in membership.view(3.5).living] == [0]
    assert membership.view(3.5).is_dead(1)
    assert membership.view(3.5).is_dead(17), "a node that is not configured is nobody to wait for"


def test_a_node_that_refuses_connections_is_dead_until_it_is_heard_again() -> None:
    membership = table()
    membership.heard(status(1), 1.0)
    membership.vanished(1, since=0.9)
    assert states(membership, 1.1)[1] == "alive", "it was heard after the look began"
    membership.vanished(1, since=1.2)
    assert states(membership, 1.5)[1] == "dead"
    assert membership.view(1.5).nodes[1].detail == "refuses connections"
    assert membership.view(1.5).is_dead(1)
    membership.vanished(1, since=1.6)
    membership.heard(status(1, sequence=2), 1.7)
    assert states(membership, 1.8)[1] == "alive"


def test_a_loop_that_wakes_late_gives_everybody_a_new_period() -> None:
    membership = table()
    membership.heard(status(1), 0.0)
    states(membership, 1.0)
    assert states(membership, 60.0) == ["alive", "alive", "dead"]
    assert states(membership, 61.0)[1] == "alive"
    assert states(membership, 62.5)[1] == "suspect"
    assert states(membership, 63.5)[1] == "dead"


def test_waking_late_does_not_raise_the_dead() -> None:
    membership = table()
    membership.heard(status(1), 0.0)
    for now in (1.0, 2.0, 3.0, 4.0):
        states(membership, now)
    assert states(membership, 60.0) == ["alive", "dead", "dead"]


def test_the_older_word_of_a_boot_changes_nothing() -> None:
    membership = table()
    assert membership.heard(status(1, sequence=5, name="new"), 1.0)
    assert not membership.heard(status(1, sequence=5, name="again"), 2.0)
    assert not membership.heard(status(1, sequence=4, name="old"), 2.0)
    row = membership.view(2.0).nodes[1]
    assert row.status is not None
    assert row.status.name == "new"


def test_a_replaced_boot_is_fenced_by_name() -> None:
    membership = table()
    membership.heard(status(1, sequence=9, boot="first"), 1.0)
    membership.heard(status(1, sequence=1, boot="second"), 2.0)
    with pytest.raises(Fenced, match=r"mini1 has been started again \(boot second\).*boot first"):
        membership.heard(status(1, sequence=10, boot="first"), 3.0)


def test_mixed_versions_refuse_with_both_named_until_cured() -> None:
    membership = table()
    with pytest.raises(ConfigError, match=r"mini1 runs mlx-cluster 9, mini0 runs mlx-cluster 0\.1\.0"):
        membership.heard(status(1, version="mlx-cluster 9"), 1.0)
    row = membership.view(1.0).nodes[1]
    assert row.state == "dead"
    assert "mlx-cluster 9" in row.detail
    membership.heard(status(1), 2.0)
    assert membership.view(2.0).nodes[1].detail == ""


def test_unknown_nodes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"node 7 .*\[0, 1, 2\]"):
        table().heard(status(7), 1.0)
    with pytest.raises(ConfigError, match="node 5"):
        Membership(5, members(2), VERSION, 1.0, 3, 0.0)


words = st.tuples(st.sampled_from([0, 1, 2]), st.integers(1, 6), st.floats(0.0, 1.5))


@given(st.lists(words, max_size=40))
def test_a_status_never_goes_back_whatever_the_order_of_words(trace: list[tuple[int, int, float]]) -> None:
    """Boots 0, 1, 2 speak in any order: once a later boot was heard, or a later sequence, the earlier has no effect."""
    membership = table()
    now = 0.0
    retired: set[int] = set()
    current: tuple[int, int] | None = None
    for boot, sequence, pause in trace:
        now += pause
        word = status(1, sequence=sequence, boot=f"b{boot}")
        if boot in retired:
            with pytest.raises(Fenced):
                membership.heard(word, now)
        else:
            fresh = current is None or current[0] != boot or sequence > current[1]
            assert membership.heard(word, now) is fresh
            if fresh:
                if current is not None and current[0] != boot:
                    retired.add(current[0])
                current = (boot, sequence)
        held = membership.view(now).nodes[1].status
        assert (held is None) == (current is None)
        if held is not None and current is not None:
            assert (held.boot_id, held.sequence) == (f"b{current[0]}", current[1])


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=60), st.integers(1, 5))
def test_death_comes_after_the_threshold_and_never_before(pauses: list[float], threshold: int) -> None:
    membership = table(threshold=threshold)
    membership.heard(status(1), 0.0)
    now = 0.0
    for pause in pauses:
        now += pause
        assert (states(membership, now)[1] == "dead") == (now > threshold)


def test_a_status_survives_its_json() -> None:
    value = status(
        1,
        transports=("grpc", "nccl"),
        mpi=(1, 3),
        leader=0,
        term=4,
        document=(1, 4, 9),
        document_hash="abc",
        models=(ModelFacts("m", "h", (1, 2, 3), 4, 5, 6, 7),),
        missing=(("other", "no such directory"),),
        stages=(StageStatus("m", Epoch(3, 2), 1, 4, 9, 77, "loading", 10, 20, 30, "why"),),
        pipelines=(PipelineStatus(plan({0: 2, 1: 4}), Epoch(3, 2), "ready", "fine"),),
        epochs=(("m", Epoch(3, 2)),),
        unplaced=(("x", "does not fit"),),
    )
    assert NodeStatus.from_json(value.to_json()) == value


def test_a_status_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(TypeError, match="surprise"):
        NodeStatus.from_json({**status(1).to_json(), "surprise": 1})


def test_a_node_that_leaves_in_good_order_is_dead_at_once_and_alive_again_with_its_next_boot() -> None:
    table = Membership(0, members(2), VERSION, 1.0, 3, 0.0)
    table.heard(status(0), 0.0)
    table.heard(status(1, 1), 0.0)
    assert table.view(0.1).nodes[1].state == "alive"
    table.heard(status(1, 2, leaving=True), 0.2)
    gone = table.view(0.2).nodes[1]
    assert (gone.state, gone.detail) == ("dead", "has left")
    table.heard(status(1, 1, boot="next"), 0.3)
    assert table.view(0.3).nodes[1].state == "alive"
