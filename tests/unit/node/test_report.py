from __future__ import annotations

import json

from pydantic import SecretStr

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.status import NodeStatus, PipelineStatus, StageStatus
from mlx_cluster.config.schema import Section
from mlx_cluster.node import report
from mlx_cluster.plan import Epoch, Plan
from tests.unit.cluster.builders import members, plan, status, view

PLAN = plan({0: 2, 1: 4}, version=3)
DOCUMENT = ClusterDocument("c", 5, 3, tuple(members(2)), (PLAN,))
LED = Leadership(0, 5)


def stage(index: int, pid: int = 77) -> StageStatus:
    bounds = PLAN.stages[index]
    return StageStatus("tiny", Epoch(3, 2), index, bounds.start, bounds.end, pid, "linked", 10, 4, 5)


def nodes(pipeline: PipelineStatus | None, **first: object) -> dict[int, NodeStatus | None]:
    driven = (pipeline,) if pipeline else ()
    return {0: status(0, pipelines=driven, stages=(stage(0),), **first), 1: status(1, stages=(stage(1, pid=78),))}


READY = PipelineStatus(PLAN, Epoch(3, 2), "ready")


def test_the_picture_has_exactly_the_promised_fields() -> None:
    picture = report.cluster("c", view(1, nodes(READY)), LED, DOCUMENT)
    assert picture["cluster"] == "c"
    assert picture["coordinator"] == {"node_id": 0, "term": 5}
    first = picture["nodes"][0]
    assert {k: first[k] for k in ("node_id", "name", "state", "pid", "host", "gateway_url")} == {
        "node_id": 0,
        "name": "mini0",
        "state": "alive",
        "pid": 100,
        "host": "10.0.0.0",
        "gateway_url": "http://10.0.0.0:8000",
    }
    (pipeline,) = picture["pipelines"]
    wanted = ("model", "epoch", "state", "transport", "engine_node_id")
    assert [pipeline[k] for k in wanted] == ["tiny", "3.2", "ready", "grpc", 0]
    fields = ("node_id", "start", "end", "pid", "memory_bytes")
    assert [[s[k] for k in fields] for s in pipeline["stages"]] == [[0, 0, 2, 77, 10], [1, 2, 6, 78, 10]]
    assert pipeline["progress"] == {"done_bytes": 8, "total_bytes": 10}


def test_nobody_drives_it_yet() -> None:
    (pipeline,) = report.pipelines(view(0, nodes(None)), DOCUMENT)
    assert (pipeline["state"], pipeline["epoch"]) == ("loading", "3.0")
    assert pipeline["detail"] == "waiting for mini0 to take it up"
    assert [s["pid"] for s in pipeline["stages"]] == [None, None], "stages of another epoch are not shown as this one's"


def test_a_driver_of_an_older_plan_or_on_a_dead_node_does_not_count() -> None:
    old = PipelineStatus(plan({0: 2, 1: 4}, version=2), Epoch(2, 9), "ready")
    for table in (view(1, nodes(old)), view(1, nodes(READY), dead=frozenset({0}))):
        assert report.pipelines(table, DOCUMENT)[0]["state"] == "loading"
        assert report.model_state("tiny", table, LED, DOCUMENT)[0] == "loading"


def test_the_transport_in_use_is_the_drivers() -> None:
    fallen = Plan(PLAN.pipeline, 3, PLAN.model, PLAN.stages, "grpc", "the ring did not come up")
    planned = ClusterDocument("c", 5, 3, (), (plan({0: 2, 1: 4}, version=3, transport="ring"),))
    (pipeline,) = report.pipelines(view(0, nodes(PipelineStatus(fallen, Epoch(3, 2), "ready"))), planned)
    assert (pipeline["transport"], pipeline["transport_reason"]) == ("grpc", "the ring did not come up")


def test_a_model_without_a_plan_is_a_failed_pipeline_with_the_coordinators_reason() -> None:
    table = view(1, nodes(None, unplaced=(("big", "3 GB are missing on mini1"),)))
    empty = ClusterDocument("c", 5, 3)
    (pipeline,) = report.cluster("c", table, LED, empty)["pipelines"]
    assert (pipeline["model"], pipeline["state"], pipeline["detail"]) == ("big", "failed", "3 GB are missing on mini1")
    assert report.model_state("big", table, LED, empty) == ("failed", "3 GB are missing on mini1")
    assert report.model_state("other", table, LED, empty)[0] == "loading"


def test_unheard_nodes_are_shown_as_unknown() -> None:
    table = view(0, {0: status(0), 1: None})
    shown = report.nodes(table)["nodes"]
    assert (shown[1]["state"], shown[1]["pid"], shown[1]["models"]) == ("dead", None, [])
    assert shown[0]["models"] == ["tiny"]


def test_secrets_are_masked() -> None:
    class Secrets(Section):
        key: SecretStr = SecretStr("hush")
        name: str = "open"

    shown = report.config(Secrets())
    assert shown["name"] == "open"
    assert "hush" not in str(shown)


def test_every_node_tells_its_round_trips_to_the_others() -> None:
    picture = report.cluster("c", view(1, nodes(READY, round_trips=((1, 0.0003),))), LED, DOCUMENT)
    assert [node["round_trips"] for node in picture["nodes"]] == [[{"node_id": 1, "seconds": 0.0003}], []]
    value = status(0, round_trips=((1, 0.0003), (2, 0.001)))
    assert NodeStatus.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_a_pipeline_tells_what_its_links_carry() -> None:
    told = PipelineStatus(PLAN, Epoch(3, 2), "ready", sent_bytes_per_second=(2048.0, 0.0))
    (pipeline,) = report.pipelines(view(1, nodes(told)), DOCUMENT)
    assert [each["sent_bytes_per_second"] for each in pipeline["stages"]] == [2048.0, 0.0]
    (pipeline,) = report.pipelines(view(1, nodes(READY)), DOCUMENT)
    assert [each["sent_bytes_per_second"] for each in pipeline["stages"]] == [None, None]
    value = status(0, pipelines=(told,))
    assert NodeStatus.from_json(json.loads(json.dumps(value.to_json()))) == value
