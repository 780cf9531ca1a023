from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_cluster.cluster.status import ModelFacts, NodeStatus, PipelineStatus, StageStatus
from mlx_cluster.config.schema import ModelEntry, Settings
from mlx_cluster.errors import LinkUnavailable, PlanError
from mlx_cluster.node.placer import ClusterPlacer, costs_of, with_transport
from mlx_cluster.plan import Epoch, Plan
from tests.unit.cluster.builders import facts, plan, status


def settings(**network: Any) -> Settings:
    return Settings.model_validate(
        {
            "cluster": {"nodes": [{"host": f"mini{i}.local", "node_id": i} for i in range(3)]},
            "network": network,
            "models": {"tiny": {}},
        }
    )


THREE = (status(0), status(1), status(2))


def only(
    placer: ClusterPlacer,
    nodes: tuple[NodeStatus, ...],
    version: int = 1,
    entry: ModelEntry = ModelEntry(),  # noqa: B008  # frozen
) -> Plan:
    """The one plan that is made of a model with one replica."""
    (made,) = placer.place("tiny", entry, nodes, version, ())
    return made


def test_an_automatic_plan_covers_the_model_over_all_nodes() -> None:
    made = only(ClusterPlacer(settings()), THREE, 7)
    assert [(s.node_id, s.start, s.end) for s in made.stages] == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]
    assert (made.version, made.pipeline, made.model.manifest_hash) == (7, "tiny", "m1")
    assert (made.transport, made.transport_reason[:5]) == ("ring", "auto:")


def test_layers_that_a_living_process_holds_stay_where_a_plan_is_as_good() -> None:
    seven = (replace(facts(layers=7), head_bytes=0),)

    def holding(node_id: int, start: int, end: int, **changes: Any) -> NodeStatus:
        values = {"pipeline": "tiny", "epoch": Epoch(1, 1), "index": 1, "start": start, "end": end}
        stage = StageStatus(**(values | changes))
        return status(node_id, models=seven, stages=(stage,))

    def ends(second: NodeStatus) -> list[int]:
        return [s.end for s in only(ClusterPlacer(settings()), (status(0, models=seven), second)).stages]

    other = ends(status(1, models=seven))
    (border, _) = other
    elsewhere = 7 - border
    assert border != elsewhere
    assert ends(holding(1, elsewhere, 7, pid=4711, state="loaded")) == [elsewhere, 7]
    assert ends(holding(1, elsewhere, 7, pid=0, state="failed")) == other
    assert ends(holding(1, elsewhere, 7, pid=4711, state="loaded", pipeline="another")) == other


def test_a_manual_split_is_obeyed_while_its_nodes_live() -> None:
    placer, entry = ClusterPlacer(settings()), ModelEntry(split="1/4/1")
    assert placer.wanted_split(entry, {0, 1, 2}) == {0: (0, 1), 1: (1, 5), 2: (5, 6)}
    assert [s.end for s in only(placer, THREE, entry=entry).stages] == [1, 5, 6]
    assert [s.node_id for s in only(placer, THREE[:2], entry=entry).stages] == [0, 1]


def test_nodes_without_the_model_or_with_another_one_are_left_out() -> None:
    nodes = (status(0, models=()), status(1), status(2, models=(facts(manifest_hash="other"),)))
    made = only(ClusterPlacer(settings()), nodes)
    assert [s.node_id for s in made.stages] == [1]
    assert made.transport == "inprocess"


def test_what_does_not_fit_names_bytes_and_node() -> None:
    nodes = tuple(replace(node, memory_free_bytes=1500) for node in THREE)
    with pytest.raises(PlanError, match=r"bytes\) are missing.*mini"):
        only(ClusterPlacer(settings()), nodes)


def test_quantized_weights_stay_packed_where_dense_ones_do_not_fit() -> None:
    known = ModelFacts("tiny", "m1", (1000,) * 6, dense_ratio=8.0, least_ratio=1.0)
    nodes = tuple(replace(node, models=(known,), memory_free_bytes=2000) for node in THREE)
    assert len(only(ClusterPlacer(settings()), nodes).stages) == 3
    stubborn = tuple(replace(node, models=(replace(known, least_ratio=8.0),)) for node in nodes)
    with pytest.raises(PlanError, match="does not fit"):
        only(ClusterPlacer(settings()), stubborn)


def test_costs_promise_the_cache_of_one_full_context() -> None:
    costs = costs_of(ModelFacts("m", "h", (10, 20), 3, 4, kv_bytes_per_token=5, max_context=100), 2.0)
    assert (costs.layer_bytes, costs.embedding_bytes, costs.head_bytes, costs.kv_bytes) == ((20, 40), 6, 8, 500)


def test_cores_are_shared_by_the_stages_of_one_machine() -> None:
    two = plan({0: 3, 1: 3})
    apart = (status(0, cores=2), status(1, cores=2))
    together = tuple(replace(node, machine="one box") for node in apart)
    assert with_transport(settings(), two, apart, {}).transport == "ring"
    assert with_transport(settings(), two, together, {}).transport == "grpc"
    fallen = with_transport(settings(), two, apart, {"ring": "port taken"})
    assert (fallen.transport, "port taken" in fallen.transport_reason) == ("grpc", True)


def test_mpi_needs_the_stages_to_be_the_ranks_of_one_mpirun() -> None:
    two, wish = plan({0: 3, 1: 3}), settings(transport="mpi")
    ranks = (status(0, mpi=(0, 2)), status(1, mpi=(1, 2)))
    assert with_transport(wish, two, ranks, {}).transport == "mpi"
    for others in ((status(0), status(1)), (status(0, mpi=(1, 2)), status(1, mpi=(0, 2))), (ranks[0], status(1))):
        with pytest.raises(LinkUnavailable, match="mpirun"):
            with_transport(wish, two, others, {})
    with pytest.raises(PlanError, match="mpirun"):
        only(ClusterPlacer(wish), THREE)


def test_a_kind_is_available_when_every_stage_has_it() -> None:
    two, wish = plan({0: 3, 1: 3}), settings(transport="nccl")
    able = status(0, transports=("grpc", "ring", "nccl"))
    assert with_transport(wish, two, (able, replace(able, node_id=1)), {}).transport == "nccl"
    with pytest.raises(LinkUnavailable, match="nccl"):
        with_transport(wish, two, (able, status(1)), {})


# -- several pipelines, standbys, what was measured ---------------------------------------------------


def cluster(count: int = 4, standby: tuple[int, ...] = (), **models: Any) -> Settings:
    return Settings.model_validate(
        {
            "cluster": {"nodes": [{"host": f"mini{i}.local", "node_id": i} for i in range(count)]},
            "nodes": {f"node_{i}": {"standby": True} for i in standby},
            "models": models or {"tiny": {}},
        }
    )


def held(made: Plan) -> dict[int, int]:
    return {s.node_id: s.num_layers for s in made.stages}


FOUR = (*THREE, status(3))


def test_replicas_get_nodes_of_their_own_and_names() -> None:
    placer = ClusterPlacer(cluster())
    first, second = placer.place("tiny", ModelEntry(replicas=2), FOUR, 1, ())
    assert (first.pipeline, second.pipeline) == ("tiny", "tiny#2")
    assert (held(first), held(second)) == ({0: 3, 1: 3}, {2: 3, 3: 3})
    (again,) = placer.place("tiny", ModelEntry(replicas=2), FOUR, 2, (second,))
    assert again.pipeline == "tiny"


def test_a_kept_plan_that_has_not_loaded_yet_takes_its_memory_all_the_same() -> None:
    nodes = tuple(replace(node, memory_free_bytes=4000) for node in THREE[:2])
    placer = ClusterPlacer(cluster())
    (first,) = placer.place("tiny", ModelEntry(), nodes, 1, ())
    assert held(first) == {0: 3, 1: 3}
    with pytest.raises(PlanError, match="does not fit"):
        placer.place("tiny", ModelEntry(replicas=2), nodes, 2, (first,))


def test_a_standby_takes_the_layers_of_the_node_that_is_away() -> None:
    placer = ClusterPlacer(cluster(standby=(3,)))
    assert held(only(placer, FOUR)) == {0: 2, 1: 2, 2: 2}
    assert held(only(placer, (FOUR[0], FOUR[2], FOUR[3]))) == {0: 2, 2: 2, 3: 2}
    split = ModelEntry(split="1/4/1")
    assert held(only(placer, (FOUR[0], FOUR[2], FOUR[3]), entry=split)) == {0: 1, 3: 4, 2: 1}
    assert placer.wanted_split(split, {0, 2, 3}) == {0: (0, 1), 3: (1, 5), 2: (5, 6)}


def test_a_standby_is_relieved_by_the_node_that_returns() -> None:
    placer = ClusterPlacer(cluster(standby=(3,)))
    stood_in = only(placer, (FOUR[0], FOUR[2], FOUR[3]))
    relieved = placer.better(stood_in, ModelEntry(), FOUR, 9, (stood_in,))
    assert relieved is not None
    assert (held(relieved), relieved.version) == ({0: 2, 1: 2, 2: 2}, 9)
    assert placer.better(relieved, ModelEntry(), FOUR, 10, (relieved,)) is None
    small = tuple(replace(node, memory_free_bytes=1700) for node in FOUR)
    wide = tuple(replace(node, models=(replace(facts(), layer_bytes=(1500,) * 4),)) for node in small)
    needed = only(placer, wide)
    assert placer.better(needed, ModelEntry(), wide, 9, (needed,)) is None, "the model fits no other way"


def test_a_standby_helps_where_the_model_fits_no_other_way() -> None:
    small = tuple(replace(node, memory_free_bytes=1700) for node in FOUR)
    wide = tuple(replace(node, models=(replace(facts(), layer_bytes=(1500,) * 4),)) for node in small)
    assert held(only(ClusterPlacer(cluster(standby=(3,))), wide)) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_what_a_pipeline_showed_decides_the_next_plan() -> None:
    placer = ClusterPlacer(cluster(2))
    seen = PipelineStatus(plan({0: 3, 1: 3}), Epoch(1, 1), "ready", step_seconds=(0.06, 0.02))
    placer.observe((replace(THREE[0], pipelines=(seen,)),))
    costs = only(placer, THREE[:2])
    assert held(costs) == {0: 3, 1: 3}, "the last stage's speed was taken for the first one's: its head took nothing"
    slow_head = replace(seen, step_seconds=(0.03, 0.05))
    placer.observe((replace(THREE[0], pipelines=(slow_head,)),))
    assert held(only(placer, THREE[:2])) == {0: 4, 1: 2}


def test_a_better_plan_must_pay() -> None:
    placer = ClusterPlacer(cluster(3))
    two = plan({0: 3, 1: 3})
    found = placer.better(two, ModelEntry(), THREE, 9, (two,))
    assert found is not None
    assert (held(found), found.version) == ({0: 2, 1: 2, 2: 2}, 9)
    assert placer.better(found, ModelEntry(), THREE, 10, (found,)) is None
    assert placer.better(two, ModelEntry(split="2/2/2"), THREE, 9, (two,)) is None
