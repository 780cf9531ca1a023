"""Four real nodes, one of them a standby: a model that only one node has, replicas, and a node that dies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster_processes import ClusterProcesses, running, within

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``spread``. Written by another process: this one shall not hold mlx while it watches others."""
    folder = tmp_path_factory.mktemp("models")
    code = (
        "import sys; from pathlib import Path; from tests.tiny_models import write_tiny_model; "
        "write_tiny_model(Path(sys.argv[1]), layers=6, width=64, vocab=320)"
    )
    (folder / "spread").mkdir()
    subprocess.run([sys.executable, "-c", code, str(folder / "spread")], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[ClusterProcesses]:
    folder = tmp_path_factory.mktemp("cluster")
    settings: dict[str, Any] = {
        "models": {
            "tiny": {"path": "spread"},  # a name: each node looks for it in its own directories
            "pair": {"path": str(models_dir / "spread"), "replicas": 2, "routing": "round_robin"},
        },
        "nodes": {f"mini{i + 1}": {"state_dir": str(folder / f"state{i}")} for i in range(4)},
    }
    settings["nodes"]["mini1"]["model_dirs"] = [str(models_dir)]
    settings["nodes"]["mini4"]["standby"] = True
    with running(ClusterProcesses(folder, models_dir, num_nodes=4, settings=settings)) as four:
        yield four


def pipeline_of(cluster: ClusterProcesses, model: str, node: int = 0) -> list[dict[str, Any]]:
    view = cluster.admin(node=node)
    return [p for p in view["pipelines"] if p["model"] == model] if view else []


def ready_on(cluster: ClusterProcesses, model: str, nodes: list[int]) -> dict[str, Any] | None:
    """The one pipeline of this model, once it is ready with a stage on each of these nodes."""
    found = pipeline_of(cluster, model)
    if len(found) != 1 or found[0]["state"] != "ready":
        return None
    return found[0] if sorted(s["node_id"] for s in found[0]["stages"]) == nodes else None


def complete(cluster: ClusterProcesses, model: str, node: int) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{cluster.gateway(node)}/v1/completions", json=body, timeout=90, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_model_of_one_node_reaches_the_others_and_is_spread_at_a_quiet_moment(cluster: ClusterProcesses) -> None:
    within("spread over the three active nodes", lambda: ready_on(cluster, "tiny", [0, 1, 2]))
    for node in (1, 2, 3):
        copied = cluster.admin("/nodes", node=node)
        assert copied is not None
        assert "tiny" in copied["nodes"][node]["models"]
    assert len({complete(cluster, "tiny", node) for node in range(4)}) == 1


def test_replicas_answer_alike_from_every_gateway(cluster: ClusterProcesses) -> None:
    def both() -> list[dict[str, Any]] | None:
        found = pipeline_of(cluster, "pair")
        return found if len(found) == 2 and all(p["state"] == "ready" for p in found) else None

    first, second = within("two replicas", both)
    assert not {s["node_id"] for s in first["stages"]} & {s["node_id"] for s in second["stages"]}
    assert {complete(cluster, "pair", node) for node in (0, 1, 2, 3, 0, 1)} == {complete(cluster, "tiny", 0)}


def test_the_standby_takes_the_place_of_a_node_that_dies(cluster: ClusterProcesses) -> None:
    before = complete(cluster, "tiny", 0)
    assert all(s["node_id"] != 3 for p in pipeline_of(cluster, "tiny") for s in p["stages"])
    cluster.kill(1)
    within("the standby holds layers", lambda: ready_on(cluster, "tiny", [0, 2, 3]))
    assert complete(cluster, "tiny", 2) == before
    assert complete(cluster, "pair", 3) == before
