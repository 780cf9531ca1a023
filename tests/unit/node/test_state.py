from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.errors import ConfigError, Fenced
from mlx_cluster.node.state import FILE_NAME, NodeState
from mlx_cluster.plan import Epoch
from tests.unit.cluster.builders import plan


def test_a_document_and_epochs_outlive_the_process(tmp_path: Path) -> None:
    state = NodeState(tmp_path / "deep" / "er", "c")
    document = ClusterDocument("c", 2, 3, plans=(plan({0: 3}),))
    assert state.accept(document)
    assert not state.accept(document)
    state.see("tiny", Epoch(3, 4))
    again = NodeState(tmp_path / "deep" / "er", "c")
    assert again.document == document
    assert again.epochs == (("tiny", Epoch(3, 4)),)
    with pytest.raises(Fenced):
        again.accept(ClusterDocument("c", 2, 2))
    with pytest.raises(Fenced, match=r"3\.3 of tiny is older than 3\.4"):
        again.see("tiny", Epoch(3, 3))


def test_the_next_epoch_is_above_everything_named(tmp_path: Path) -> None:
    state = NodeState(tmp_path, "c")
    assert state.next_epoch("tiny", 3) == Epoch(3, 1)
    assert state.next_epoch("tiny", 3) == Epoch(3, 2)
    assert state.next_epoch("tiny", 3, named=Epoch(3, 9)) == Epoch(3, 10)
    assert state.next_epoch("tiny", 4, named=Epoch(3, 9)) == Epoch(4, 1)
    assert NodeState(tmp_path, "c").next_epoch("tiny", 4) == Epoch(4, 2)


def test_an_older_plan_version_cannot_be_started(tmp_path: Path) -> None:
    state = NodeState(tmp_path, "c")
    state.see("tiny", Epoch(5, 1))
    with pytest.raises(Fenced):
        state.next_epoch("tiny", 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_epochs_never_fall_also_over_restarts(tmp_path: Path, trace: list[tuple[int, int]]) -> None:
    folder = tmp_path / str(abs(hash(tuple(trace))))
    highest = Epoch(-1, 0)
    for version, incarnation in trace:
        state = NodeState(folder, "c")
        epoch = Epoch(version, incarnation)
        if epoch < highest:
            with pytest.raises(Fenced):
                state.see("tiny", epoch)
        else:
            state.see("tiny", epoch)
            highest = epoch


@pytest.mark.parametrize("text", ["", "{", "[]", '{"document": "{}", "epochs": {}}'])
def test_a_broken_file_names_itself_and_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ConfigError, match=rf"{FILE_NAME}.*remove it"):
        NodeState(tmp_path, "c")


def test_another_clusters_memory_is_refused(tmp_path: Path) -> None:
    NodeState(tmp_path, "c").see("tiny", Epoch(1, 1))
    with pytest.raises(ConfigError, match="belongs to cluster 'c', this node to 'd'"):
        NodeState(tmp_path, "d")


def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir"):
        NodeState(tmp_path / "file" / "inside", "c")
