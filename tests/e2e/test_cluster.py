"""Real agents and real stage processes: the picture, every gateway, and what happens when processes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster_processes import ClusterProcesses, alive, running, within

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by another process: this one shall not hold mlx while it watches others."""
    folder = tmp_path_factory.mktemp("model")
    code = (
        "import sys; from pathlib import Path; from tests.tiny_models import write_tiny_model; "
        "write_tiny_model(Path(sys.argv[1]), layers=6, width=64, vocab=320)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[ClusterProcesses]:
    """Three nodes, 3/2/1 layers; tests that hurt it leave it ready again."""
    with running(ClusterProcesses(tmp_path_factory.mktemp("cluster"), model_dir, split="3/2/1")) as three:
        three.wait_ready()
        yield three


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_every_node_shows_the_same_picture(cluster: ClusterProcesses) -> None:
    pictures = [cluster.admin(node=node) for node in range(3)]
    assert pictures[0] is not None
    for picture in pictures:
        assert picture is not None
        assert picture["coordinator"] == pictures[0]["coordinator"]
        assert picture["coordinator"]["node_id"] in (0, 1, 2)
        assert picture["coordinator"]["term"] >= 1
        assert [(n["node_id"], n["name"], n["state"], n["pid"]) for n in picture["nodes"]] == [
            (i, f"mini{i + 1}", "alive", cluster.processes[i].pid) for i in range(3)
        ]
        assert [n["gateway_url"] for n in picture["nodes"]] == [cluster.gateway(i) for i in range(3)]
        (pipeline,) = picture["pipelines"]
        assert (pipeline["model"], pipeline["state"], pipeline["transport"]) == ("tiny", "ready", "grpc")
        assert pipeline["engine_node_id"] == 0
        assert pipeline["transport_reason"]
        assert [(s["node_id"], s["start"], s["end"]) for s in pipeline["stages"]] == [(0, 0, 3), (1, 3, 5), (2, 5, 6)]
        assert all(alive(s["pid"]) and s["memory_bytes"] > 0 for s in pipeline["stages"])
        assert pipeline["progress"]["done_bytes"] == pipeline["progress"]["total_bytes"] > 0


def test_the_other_http_ports_answer(cluster: ClusterProcesses) -> None:
    plan = cluster.admin("/plan", node=1)
    assert plan is not None
    assert [s["end"] for s in plan["plans"][0]["stages"]] == [3, 5, 6]
    models = cluster.admin("/models", node=2)
    assert models is not None
    assert models["models"][0]["state"] == "ready"
    config = cluster.admin("/config", node=1)
    assert config is not None
    assert config["models"]["tiny"]["split"] == "3/2/1"
    own = cluster.admin("/stages", node=2, offset=0)
    assert own is not None
    assert [(s["index"], s["start"], s["end"], s["state"]) for s in own["stages"]] == [(2, 5, 6, "linked")]
    health = cluster.admin("/health", node=1, offset=2)
    assert health is not None
    assert health["status"] == "ok"


def test_the_coordinator_answers_on_its_own_port(cluster: ClusterProcesses) -> None:
    port = cluster.first_port + 6 * cluster.num_nodes
    picture = httpx.get(f"http://127.0.0.1:{port}/cluster", timeout=10, trust_env=False).json()
    assert picture["coordinator"]["node_id"] in (0, 1, 2)


def test_every_gateway_gives_the_same_completion(cluster: ClusterProcesses) -> None:
    texts = {text_of(cluster.complete(node)) for node in range(3)}
    assert len(texts) == 1


class Stream(threading.Thread):
    """A streamed completion of 300 tokens, read until its end; ``started`` is set by the first token."""

    def __init__(self, cluster: ClusterProcesses, node: int) -> None:
        super().__init__(daemon=True)
        self.url = f"{cluster.gateway(node)}/v1/completions"
        self.started = threading.Event()
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        body = {
            "model": "tiny",
            "prompt": "hello",
            "max_tokens": 300,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.stream("POST", self.url, json=body, timeout=120, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.started.set()

    def text(self) -> str:
        """The whole text of a stream that ended without an error, once."""
        self.join(120)
        assert not self.is_alive(), "the stream hangs"
        *chunks, last = self.events
        assert last == "[DONE]"
        found = [json.loads(chunk) for chunk in chunks]
        assert [chunk["error"] for chunk in found if "error" in chunk] == []
        choices = [chunk["choices"][0] for chunk in found if chunk["choices"]]
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
        return "".join(choice["text"] for choice in choices)


def test_a_client_that_comes_back_at_another_gateway_gets_the_whole_answer(cluster: ClusterProcesses) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "temperature": 1, "stream": True, "ignore_eos": True}

    def events(gateway: int, most: int | None = None, **changes: Any) -> list[Any]:
        """The objects of a stream that is left after so many."""
        found: list[Any] = []
        headers = {"Idempotency-Key": "come back"}
        url = f"{cluster.gateway(gateway)}/v1/completions"
        with httpx.stream(
            "POST", url, json={**body, **changes}, headers=headers, timeout=60, trust_env=False
        ) as answer:
            if answer.status_code != 200:
                return [json.loads(answer.read())]
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    found.append(json.loads(line.removeprefix("data: ")))
                if most is not None and len(found) >= most:
                    return found
        return found

    def said(found: list[Any]) -> str:
        return "".join(event["choices"][0]["text"] for event in found)

    begun = events(0, most=5)
    whole = events(1)
    assert {event["id"] for event in begun} == {event["id"] for event in whole}
    assert whole[-1]["choices"][0]["finish_reason"] == "length"
    assert said(whole).startswith(said(begun))
    # The seed follows from the key, too: greedy or not, the answer is the same one for as long as anybody asks.
    assert said(events(2)) == said(whole)
    assert events(2, max_tokens=3)[0]["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("gateway", [0, 2])
def test_a_killed_stage_process_is_a_pause_and_comes_back(cluster: ClusterProcesses, gateway: int) -> None:
    before = cluster.wait_ready()
    expected = text_of(cluster.complete(gateway))
    whole = Stream(cluster, gateway).text()
    stream = Stream(cluster, gateway)
    assert stream.started.wait(60)
    killed_at = time.time()
    os.kill(before["stages"][1]["pid"], signal.SIGKILL)
    assert stream.text() == whole

    def again(node: int) -> bool:
        pipeline = cluster.ready(node)
        return pipeline is not None and pipeline["epoch"] != before["epoch"]

    for node in range(3):
        within(f"node {node} sees the pipeline again", lambda node=node: again(node))
    after = cluster.wait_ready()
    version, _, incarnation = before["epoch"].partition(".")
    assert after["epoch"] == f"{version}.{int(incarnation) + 1}", "same plan, next incarnation"
    old, new = ([s["pid"] for s in picture["stages"]] for picture in (before, after))
    assert (new[0], new[2]) == (old[0], old[2]), "what was not hurt goes on with the layers that it has"
    assert new[1] != old[1]
    assert not alive(old[1])
    assert text_of(cluster.complete(gateway)) == expected
    picture = cluster.admin(node=gateway)
    assert picture is not None
    last = picture["recoveries"][0]
    assert (last["pipeline"], last["epoch"], last["node_id"]) == ("tiny", after["epoch"], 0)
    assert last["cause"].startswith("stage 1 (layers 3…4) on node 1: ")
    lost = next(t for t in picture["transitions"] if t["kind"] == "pipeline_lost")
    assert killed_at <= lost["at"] <= last["at"]
    assert 0 < last["seconds"] <= last["at"] - killed_at
    assert (lost["epoch"], lost["cause"]) == (before["epoch"], last["cause"])


def test_a_killed_agent_takes_its_stages_along_and_the_survivors_take_over(tmp_path: Path, model_dir: Path) -> None:
    """kill -9 of the agent that leads, drives and holds stage 0: no orphan, another coordinator, a plan over two."""
    with running(ClusterProcesses(tmp_path, model_dir)) as three:
        before = three.wait_ready()
        expected = text_of(three.complete(2))
        own = [s["pid"] for s in before["stages"] if s["node_id"] == 0]
        three.kill(0)
        within("the dead agent's stage process is gone", lambda: not any(map(alive, own)), 30)

        def taken_over() -> dict[str, Any] | None:
            picture = three.admin(node=1)
            if picture is None or picture["coordinator"]["node_id"] not in (1, 2):
                return None
            pipelines = picture["pipelines"]
            if not pipelines or pipelines[0]["state"] != "ready":
                return None
            # A coordinator may be there before the dead node counts as dead.
            return picture if 0 not in {s["node_id"] for s in pipelines[0]["stages"]} else None

        picture = within("a plan over the survivors", taken_over)
        (pipeline,) = picture["pipelines"]
        assert {s["node_id"] for s in pipeline["stages"]} == {1, 2}
        assert picture["coordinator"]["term"] > 1
        assert picture["recoveries"][0]["cause"].startswith("mini1 is dead (")
        assert next(n for n in picture["nodes"] if n["node_id"] == 0)["state"] == "dead"
        three.wait_ready(2)
        assert text_of(three.complete(2)) == expected
        port = three.first_port + 6 * three.num_nodes
        within("the new coordinator has the port", lambda: answers(f"http://127.0.0.1:{port}/cluster"))
        three.start(0)
        three.wait_ready(0)
        assert text_of(three.complete(0)) == expected, "the node that came back serves through the others"
        pids = [s["pid"] for s in (three.ready(1) or {"stages": []})["stages"]]
        assert pids
    assert not any(map(alive, pids)), "an orderly stop leaves no stage process"
    assert {process.returncode for process in three.processes.values()} == {0}


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_model_that_is_not_there_is_said_everywhere(tmp_path: Path) -> None:
    with running(ClusterProcesses(tmp_path, tmp_path / "nothing", num_nodes=1)) as one:
        pipeline = within("the failure is shown", lambda: one.pipeline())
        assert pipeline["state"] == "failed"
        assert str(tmp_path / "nothing") in pipeline["detail"]
        answer = one.complete(0)
        assert answer.status_code == 503
        ready = httpx.get(f"http://127.0.0.1:{one.first_port + 2}/readyz", timeout=10, trust_env=False)
        assert ready.status_code == 503
        assert "tiny is failed" in ready.text


def test_one_node_holds_the_whole_model_without_a_link(tmp_path: Path, model_dir: Path) -> None:
    with running(ClusterProcesses(tmp_path, model_dir, num_nodes=1)) as one:
        pipeline = one.wait_ready()
        assert (pipeline["transport"], len(pipeline["stages"])) == ("inprocess", 1)
        assert len(text_of(one.complete(0))) > 0
