"""Real processes: the coordinator dies, freezes, is told to go, loses its quorum; the pipeline must not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_cluster.cluster import stable
from tests.e2e.cluster_processes import ClusterProcesses, running, within
from tests.e2e.test_cluster import Stream, text_of

pytestmark = pytest.mark.timeout(240)

TWO_STAGES = "0/3/3"  # node 0 founds the cluster and leads first; it holds no stage


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    code = (
        "import sys; from pathlib import Path; from tests.tiny_models import write_tiny_model; "
        "write_tiny_model(Path(sys.argv[1]), layers=6, width=64, vocab=320)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)
    return folder


def leader(cluster: ClusterProcesses, node: int) -> int | None:
    """Who leads, as this node sees it."""
    picture = cluster.admin(node=node)
    return None if picture is None else picture["coordinator"]["node_id"]


def other_leader(cluster: ClusterProcesses, node: int, than: int) -> int | None:
    found = leader(cluster, node)
    return found if found is not None and found != than else None


def command(cluster: ClusterProcesses, node: int, method: str, path: str, body: dict[str, Any]) -> httpx.Response:
    url = f"http://127.0.0.1:{cluster.first_port + 5 * node + 4}{path}"
    return httpx.request(method, url, json=body, timeout=60, trust_env=False)


def have_lead(cluster: ClusterProcesses, node: int) -> None:
    """By the operator's word, which is taken back so that the others may lead later."""
    answer = command(cluster, 1, "POST", "/coordinator", {"node": str(node)})
    assert answer.status_code == 200, answer.text
    within(f"node {node} leads", lambda: leader(cluster, 1) == node)
    within("the pin is gone", lambda: command(cluster, 1, "DELETE", "/coordinator", {}).status_code == 200)


@pytest.fixture
def three(tmp_path: Path, model_dir: Path) -> Iterator[ClusterProcesses]:
    with running(ClusterProcesses(tmp_path, model_dir, split=TWO_STAGES)) as cluster:
        cluster.wait_ready()
        yield cluster


def unmoved(pipeline: dict[str, Any]) -> dict[str, Any]:
    """A pipeline without what it is doing at the moment."""
    stages = [{**stage, "sent_bytes_per_second": None} for stage in pipeline["stages"]]
    return {**pipeline, "stages": stages, "detail": ""}


def test_a_coordinator_without_a_stage_may_freeze_or_die_and_nobody_notices(three: ClusterProcesses) -> None:
    before = three.wait_ready(1)
    assert [s["node_id"] for s in before["stages"]] == [1, 2]
    have_lead(three, 0)
    picture = three.admin(node=1)
    assert picture is not None
    first_term = picture["coordinator"]["term"]

    frozen = three.processes[0]
    stream = Stream(three, 1)
    assert stream.started.wait(60)
    frozen.send_signal(signal.SIGSTOP)
    try:
        within("another coordinator while the first is frozen", lambda: other_leader(three, 1, 0) is not None)
    finally:
        frozen.send_signal(signal.SIGCONT)
    within("the revived one follows", lambda: leader(three, 0) == leader(three, 1) != 0)
    picture = three.admin(node=0)
    assert picture is not None
    assert picture["coordinator"]["term"] > first_term
    assert unmoved(three.wait_ready(1)) == unmoved(before), "no new epoch, the same processes"

    have_lead(three, 0)
    three.kill(0)
    within("a coordinator after the kill", lambda: other_leader(three, 1, 0) is not None)
    within("the dead one is known for dead", lambda: three.admin(node=1)["nodes"][0]["state"] == "dead")  # type: ignore[index]
    after = three.wait_ready(1)
    assert after["epoch"] == before["epoch"]
    assert [s["pid"] for s in after["stages"]] == [s["pid"] for s in before["stages"]]
    stream.join(120)
    assert not stream.is_alive()
    assert stream.events[-1] == "[DONE]"
    assert "error" not in stream.events[-2]
    picture = three.admin(node=1)
    assert picture is not None
    assert picture["election"]["has_quorum"]
    assert picture["elections"][0]["reason"].startswith("elected after mini1, last heard of")
    assert {t["kind"] for t in picture["transitions"]} >= {"coordinator_elected", "coordinator_lost", "node_dead"}


def test_the_whole_cluster_remembers_its_document_and_its_terms(tmp_path: Path, model_dir: Path) -> None:
    cluster = ClusterProcesses(tmp_path, model_dir, split=TWO_STAGES)
    with running(cluster):
        cluster.wait_ready()
        answer = command(cluster, 2, "POST", "/nodes/mini1/drain", {})
        assert answer.status_code == 200, answer.text
        before = cluster.admin(node=1)
    assert before is not None
    with running(cluster):
        cluster.wait_ready()
        after = cluster.admin(node=1)
        assert after is not None
        assert after["coordinator"]["term"] > before["coordinator"]["term"]
        assert after["document"]["drained"] == [0]
        assert after["document"]["era"] == before["document"]["era"] == 1
        assert [v["voter"] for v in after["election"]["voters"]] == [v["voter"] for v in before["election"]["voters"]]
        old, new = (tuple(map(int, p["pipelines"][0]["epoch"].split("."))) for p in (before, after))
        assert new > old, "an epoch of the earlier life does not come back"


def test_two_nodes_with_a_witness_outlive_one_and_without_it_a_new_founding_must_be_forced(
    tmp_path: Path, model_dir: Path
) -> None:
    cluster = ClusterProcesses(tmp_path, model_dir, num_nodes=2)
    port = cluster.first_port + 6 * cluster.num_nodes + 21
    witness_dir = tmp_path / "witness"
    cluster.amend({"cluster": {"witness": {"host": "127.0.0.1", "port": port, "state_dir": str(witness_dir)}}})
    with (tmp_path / "witness.log").open("wb") as output:
        witness = subprocess.Popen(
            [sys.executable, "-m", "mlx_cluster", "witness", "--config", str(tmp_path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
        )
    try:
        with running(cluster):
            cluster.wait_ready()
            expected = text_of(cluster.complete(0))

            def seated() -> bool:
                picture = cluster.admin(node=0)
                return picture is not None and len(picture["election"]["voters"]) == 3

            within("the witness has its seat", seated)
            led = within("a coordinator", lambda: (leader(cluster, 0) or 0) + 1) - 1
            left = 1 - led
            cluster.kill(led)
            within("the other node leads", lambda: leader(cluster, left) == left)
            cluster.wait_ready(left)
            assert text_of(cluster.complete(left)) == expected
            stored = stable.load(witness_dir / "voter.state")
            assert not isinstance(stored, stable.LostDisk)
            assert stored.document is not None
            assert "tiny" in stored.document.body

            refused = command(cluster, left, "POST", "/coordinator/force-new-cluster", {})
            assert refused.status_code == 503
            assert "this node leads" in refused.json()["error"]["message"]
            witness.kill()
            witness.wait(20)

            def alone() -> dict[str, Any] | None:
                picture = cluster.admin(node=left)
                return picture if picture is not None and not picture["election"]["has_quorum"] else None

            picture = within("it says that quorum is lost", alone)
            assert "2 of 3 voters must agree" in picture["election"]["detail"]
            assert text_of(cluster.complete(left)) == expected, "what serves goes on serving"
            forced = command(cluster, left, "POST", "/coordinator/force-new-cluster", {})
            assert forced.status_code == 200, forced.text
            within("it leads the new era", lambda: leader(cluster, left) == left)
            picture = cluster.admin(node=left)
            assert picture is not None
            assert picture["election"]["era"] == 2
            cluster.start(led)

            def joined() -> bool:
                picture = cluster.admin(node=left)
                return picture is not None and len(picture["election"]["voters"]) == 2

            within("the lost node joins the new era", joined)
    finally:
        witness.kill()
        witness.wait(20)
