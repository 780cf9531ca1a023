"""What the admin API says, in words."""

from __future__ import annotations

from typing import Any

import httpx

from mlx_cluster.cli.status import _stage_line
from mlx_cluster.cli.view import ClusterView, ask_cluster, progress_text, ready_line


def answer(state: str = "ready", **more: Any) -> dict[str, Any]:
    stages = [(0, 0, 10), (1, 10, 19), (2, 19, 28)]
    return {
        "cluster": "c",
        "coordinator": {"node_id": 0, "term": 1},
        "nodes": [
            {"node_id": i, "name": name, "state": "alive", "pid": 1, "host": "h", "gateway_url": None}
            for i, name in enumerate(("mini1", "mini2", "master"))
        ],
        "pipelines": [
            {
                "model": "demo",
                "epoch": "1.1",
                "state": state,
                "detail": "",
                "transport": "grpc",
                "transport_reason": "two cores",
                "engine_node_id": 0,
                "progress": {"done_bytes": 45, "total_bytes": 100},
                "stages": [{"node_id": n, "start": a, "end": b, "pid": None, "memory_bytes": 5} for n, a, b in stages],
                **more,
            }
        ],
    }


def test_the_ready_line() -> None:
    view = ClusterView.from_json(answer())
    assert ready_line("http://127.0.0.1:8000/v1", view.pipelines) == (
        "ready http://127.0.0.1:8000/v1  model demo  mini1[0-10) mini2[10-19) master[19-28)  transport grpc (two cores)"
    )


def test_the_ready_line_is_one_line_whatever_a_reason_says() -> None:
    view = ClusterView.from_json(answer(transport_reason="one\ntwo"))
    assert "\n" not in ready_line("http://x/v1", view.pipelines)


def test_progress_in_words() -> None:
    assert progress_text(None, ["demo"]) == "starting the nodes"
    view = ClusterView.from_json(answer("loading"))
    assert progress_text(view, ["demo", "other"]) == (
        "3 of 3 nodes are up; demo: loading 40 % on mini1[0-10) mini2[10-19) master[19-28); other: waiting for a plan"
    )


def test_a_model_without_a_plan_is_a_failed_pipeline() -> None:
    view = ClusterView.from_json({**answer(), "pipelines": [], "unplaced": {"demo": "9 bytes are missing"}})
    assert progress_text(view, ["demo"]) == "3 of 3 nodes are up; demo: failed: 9 bytes are missing"


def test_an_answer_that_lacks_fields_is_shown_anyway() -> None:
    view = ClusterView.from_json({"coordinator": None, "nodes": [{"node_id": 7}], "pipelines": [{"model": "m"}]})
    assert (view.coordinator, view.nodes[0].name, view.pipelines[0].state) == ("none", "node_7", "unknown")


async def test_the_first_node_that_answers_is_believed() -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        match request.url.host:
            case "dead":
                raise httpx.ConnectError("refused")
            case "confused":
                return httpx.Response(200, text="<html>")
            case "starting":
                return httpx.Response(503, json={})
            case _:
                return httpx.Response(200, json=answer())

    async with httpx.AsyncClient(transport=httpx.MockTransport(serve)) as client:
        view = await ask_cluster(client, ["http://dead", "http://confused", "http://starting", "http://good"])
        assert view is not None
        assert view.cluster == "c"
        assert await ask_cluster(client, ["http://dead", "http://confused"]) is None


def test_round_trips_are_read_where_there_are_any() -> None:
    data = answer()
    data["nodes"][1]["round_trips"] = [{"node_id": 0, "seconds": 0.0003}]
    assert [node.round_trips for node in ClusterView.from_json(data).nodes] == [(), ((0, 0.0003),), ()]


def test_a_stage_says_what_its_link_carries() -> None:
    data = answer()
    data["pipelines"][0]["stages"][0]["sent_bytes_per_second"] = 1_250_000.0
    data["pipelines"][0]["stages"][1]["sent_bytes_per_second"] = 0.0
    (pipeline,) = ClusterView.from_json(data).pipelines
    assert [_stage_line(stage) for stage in pipeline.stages] == [
        "mini1[0-10) sends 1.2 MB/s",
        "mini2[10-19)",
        "master[19-28)",
    ]
