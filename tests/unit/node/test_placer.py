from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_cluster.cluster.status import ModelFacts
from mlx_cluster.config.schema import ModelEntry, Settings
from mlx_cluster.errors import LinkUnavailable, PlanError
from mlx_cluster.node.placer import ClusterPlacer, costs_of, with_transport
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


def test_an_automatic_plan_covers_the_model_over_all_nodes() -> None:
    made = ClusterPlacer(settings())("tiny", ModelEntry(), THREE, 7)
    assert [(s.node_id, s.start, s.end) for s in made.stages] == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]
    assert (made.version, made.pipeline, made.model.manifest_hash) == (7, "tiny", "m1")
    assert (made.transport, made.transport_reason[:5]) == ("ring", "auto:")


def test_a_manual_split_is_obeyed_while_its_nodes_live() -> None:
    placer, entry = ClusterPlacer(settings()), ModelEntry(split="1/4/1")
    assert placer.wanted_split(entry) == {0: (0, 1), 1: (1, 5), 2: (5, 6)}
    assert [s.end for s in placer("tiny", entry, THREE, 1).stages] == [1, 5, 6]
    assert [s.node_id for s in placer("tiny", entry, THREE[:2], 1).stages] == [0, 1]


def test_nodes_without_the_model_or_with_another_one_are_left_out() -> None:
    nodes = (status(0, models=()), status(1), status(2, models=(facts(manifest_hash="other"),)))
    made = ClusterPlacer(settings())("tiny", ModelEntry(), nodes, 1)
    assert [s.node_id for s in made.stages] == [1]
    assert made.transport == "inprocess"


def test_what_does_not_fit_names_bytes_and_node() -> None:
    nodes = tuple(replace(node, memory_free_bytes=1500) for node in THREE)
    with pytest.raises(PlanError, match=r"bytes\) are missing.*mini"):
        ClusterPlacer(settings())("tiny", ModelEntry(), nodes, 1)


def test_quantized_weights_stay_packed_where_dense_ones_do_not_fit() -> None:
    known = ModelFacts("tiny", "m1", (1000,) * 6, dense_ratio=8.0, least_ratio=1.0)
    nodes = tuple(replace(node, models=(known,), memory_free_bytes=2000) for node in THREE)
    assert len(ClusterPlacer(settings())("tiny", ModelEntry(), nodes, 1).stages) == 3
    stubborn = tuple(replace(node, models=(replace(known, least_ratio=8.0),)) for node in nodes)
    with pytest.raises(PlanError, match="does not fit"):
        ClusterPlacer(settings())("tiny", ModelEntry(), stubborn, 1)


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
        ClusterPlacer(wish)("tiny", ModelEntry(), THREE, 1)


def test_a_kind_is_available_when_every_stage_has_it() -> None:
    two, wish = plan({0: 3, 1: 3}), settings(transport="nccl")
    able = status(0, transports=("grpc", "ring", "nccl"))
    assert with_transport(wish, two, (able, replace(able, node_id=1)), {}).transport == "nccl"
    with pytest.raises(LinkUnavailable, match="nccl"):
        with_transport(wish, two, (able, status(1)), {})
