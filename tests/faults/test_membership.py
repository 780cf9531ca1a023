"""Nodes that go and come back under load: a model that no longer fits, a standby, a node that is drained."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_cluster import demo
from tests.e2e.cluster_processes import ClusterProcesses, running, within
from tests.faults.fleet import CELL_SECONDS, Stream, bodies
from tests.faults.fleet import load as load_with
from tests.unit.node.test_discovery import loopback_has_multicast

pytestmark = pytest.mark.timeout(6 * CELL_SECONDS)


def made(folder: Path, num_nodes: int, nodes: dict[int, dict[str, Any]], **sections: Any) -> ClusterProcesses:
    """Placed automatically; ``nodes`` says what is special about some of them."""
    cluster = ClusterProcesses(folder, demo.model_dir(), num_nodes=num_nodes)
    states = {i: {"state_dir": str(folder / f"state{i}"), **nodes.get(i, {})} for i in range(num_nodes)}
    settings: dict[str, Any] = {
        "runtime": {"blas": "off"},
        "api_gateway": {"recovery_timeout": CELL_SECONDS, "keepalive_seconds": 1.0},
        "network": {"transport": "grpc"},
        "nodes": {cluster.name(i): state for i, state in states.items()},
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    cluster.amend(settings)
    return cluster


def load(urls: list[str], strike: Callable[[], None] | None = None) -> list[Stream]:
    """Four greedy and four seeded streams: half of the matrix's, for what matters here is who comes and goes."""
    return load_with(urls, strike, bodies()[::2])


def holders(cluster: ClusterProcesses, node: int = 0) -> list[int]:
    """The nodes of the pipeline's stages, as this node sees them; empty while it is not ready."""
    pipeline = cluster.ready(node)
    return [stage["node_id"] for stage in pipeline["stages"]] if pipeline is not None else []


def held_by(cluster: ClusterProcesses, *nodes: int) -> None:
    within(f"nodes {nodes} hold the layers", lambda: holders(cluster) == list(nodes), CELL_SECONDS)


def check(streams: list[Stream], reference: list[Stream]) -> None:
    """Nobody noticed more than a pause."""
    for index, (stream, quiet) in enumerate(zip(streams, reference, strict=True)):
        assert stream.errors == [], f"stream {index}"
        assert stream.tokens == quiet.tokens, f"stream {index} differs from the quiet run"
        assert (stream.ends, stream.num_done, stream.reconnects) == (["length"], 1, 0), f"stream {index}"


class Background(threading.Thread):
    """Work beside the streams; ``finish`` raises what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work, self._error = work, list[BaseException]()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  # raised again by ``finish``
            self._error.append(error)

    def finish(self) -> None:
        self.join(2 * CELL_SECONDS)
        assert not self.is_alive()
        for error in self._error:
            raise error


# -- a model that needs all of its nodes ---------------------------------------------------------------


def test_a_model_that_no_longer_fits_says_so_and_serves_again_when_the_node_is_back(tmp_path: Path) -> None:
    """Of the demo's 22 MB three nodes hold 8.4 at most; two would hold 11.4 each, and may hold 9.5."""
    capped = {i: {"memory_budget": "9.5MB"} for i in range(3)}
    runtime = {"kv_budget": "64MB", "prefix_cache": {"enabled": False}}
    cluster = made(tmp_path, 3, capped, runtime=runtime, models={"tiny": model(max_context=512)})
    with running(cluster):
        held_by(cluster, 0, 1, 2)
        reference = load([cluster.gateway(0)])

        def fall_and_rise() -> None:
            cluster.kill(2)
            waiting = cluster.complete(0)  # it asked before anybody knew, and waits until it is decided
            refused_at = time.time()
            assert waiting.status_code == 503, waiting.text
            assert int(waiting.headers["retry-after"]) >= 1
            message = waiting.json()["error"]["message"]
            assert re.search(r"does not fit: .*\(\d+ bytes\) are missing; mini\d would need .* and has 9\.5", message)
            began = time.monotonic()
            assert cluster.complete(0).status_code == 503
            at_once_seconds = time.monotonic() - began
            decided_at = unplanned_at(cluster)
            print(
                f"503 {refused_at - decided_at:.2f} s after the re-plan for who waited, "
                f"{at_once_seconds:.2f} s for who came later: {message}"
            )
            assert refused_at - decided_at < 15, "generous: it is to be 2 s on a quiet machine"
            assert at_once_seconds < 15
            cluster.start(2)

        worker = Background(fall_and_rise)
        streams = load([cluster.gateway(0)], worker.start)
        worker.finish()
        check(streams, reference)
        held_by(cluster, 0, 1, 2)
        assert cluster.complete(1).status_code == 200


def model(**changes: Any) -> dict[str, Any]:
    return {"path": str(demo.model_dir()), **changes}


def unplanned_at(cluster: ClusterProcesses) -> float:
    """When the document without a plan was committed, in Unix seconds."""
    picture = cluster.admin(node=0)
    assert picture is not None
    return float(next(t["at"] for t in picture["transitions"] if t["kind"] == "document_committed" and not t["plans"]))


# -- a standby, and a node that is drained ----------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three that share the layers, and mini4, which stands by."""
    with running(made(tmp_path_factory.mktemp("four"), 4, {3: {"standby": True}})) as cluster:
        held_by(cluster, 0, 1, 2)
        yield cluster


@pytest.fixture(scope="module")
def reference(four: ClusterProcesses) -> list[Stream]:
    return load([four.gateway(0)])


def test_a_standby_stands_in_and_is_relieved_at_a_quiet_moment(four: ClusterProcesses, reference: list[Stream]) -> None:
    held_by(four, 0, 1, 2)
    check(load([four.gateway(0)], lambda: four.kill(1)), reference)
    held_by(four, 0, 2, 3)
    four.start(1)
    held_by(four, 0, 1, 2)
    assert four.complete(1).status_code == 200


def test_a_drained_node_gives_its_layers_away_under_load_and_gets_them_back(
    four: ClusterProcesses, reference: list[Stream]
) -> None:
    held_by(four, 0, 1, 2)
    began: list[subprocess.Popen[str]] = []
    rounds = [load([four.gateway(0)], lambda: began.append(operator(four, "drain", "mini2")))]
    out, _ = began[0].communicate(timeout=CELL_SECONDS)
    assert began[0].returncode == 0, out
    assert "mini2 is drained" in out
    deadline = time.monotonic() + CELL_SECONDS
    while holders(four) != [0, 2, 3]:
        assert time.monotonic() < deadline, "its layers stay"
        rounds.append(load([four.gateway(0)]))
    for streams in rounds:
        check(streams, reference)
    picture = four.admin(node=2)
    assert picture is not None
    assert [n["name"] for n in picture["nodes"] if n["drained"]] == ["mini2"]
    assert picture["nodes"][1]["state"] == "alive"
    assert four.complete(1).status_code == 200, "its gateway serves on"

    back = operator(four, "undrain", "mini2")
    out, _ = back.communicate(timeout=CELL_SECONDS)
    assert back.returncode == 0, out
    held_by(four, 0, 1, 2)


def operator(cluster: ClusterProcesses, verb: str, node: str) -> subprocess.Popen[str]:
    url = f"http://127.0.0.1:{cluster.first_port + 5 * 3 + 4}"
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_cluster", "node", verb, node, "--url", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# -- addresses that nobody configured ------------------------------------------------------------------------


def test_nodes_with_wrong_addresses_for_each_other_meet_by_mdns(tmp_path: Path) -> None:
    """Each configuration has the other node where nothing listens; what they advertise is the only way."""
    if not loopback_has_multicast():
        pytest.skip("this machine's loopback interface carries no multicast")
    nodes = {i: {"interfaces": ["127.0.0.1"]} for i in range(2)}
    discovering = {"cluster": {"discovery": "mdns"}, "coordinator": {"health_check_interval": 0.5}}
    cluster = made(tmp_path, 2, nodes, models={"tiny": {"path": str(tmp_path / "none")}})
    cluster.amend(discovering)
    tree = yaml.safe_load((tmp_path / "cluster.yaml").read_text())
    try:
        for node in range(2):
            own = copy.deepcopy(tree)
            own["cluster"]["nodes"][1 - node]["host"] = "127.0.0.3"
            own["api_gateway"]["port"] += node  # the first gateway on its host takes the first port
            cluster.folder = tmp_path / f"config{node}"
            cluster.folder.mkdir()
            (cluster.folder / "cluster.yaml").write_text(yaml.safe_dump(own))
            cluster.start(node)

        def met(node: int) -> bool:
            picture = cluster.admin(node=node)
            return (
                picture is not None
                and all(each["state"] == "alive" for each in picture["nodes"])
                and picture["coordinator"]["node_id"] is not None
                and len(picture["election"]["voters"]) == 2
            )

        for node in range(2):
            within(f"node {node} knows the other", lambda node=node: met(node), CELL_SECONDS)
    finally:
        cluster.stop()
