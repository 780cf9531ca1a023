"""Every role dies, hangs and is told to go, over gRPC links: sixteen streams go on as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.faults.fleet import CELL_SECONDS, GATEWAY, Fleet, fleet, load

pytestmark = pytest.mark.timeout(4 * CELL_SECONDS)
SIGNALS = [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM]
ENGINE, STAGE = 1, 2


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Nodes 1 and 2 hold the stages, 1 the engine; 3 is the clients' gateway, 0 stands by."""
    with fleet(tmp_path_factory.mktemp("fleet"), "0/14/14/0") as made:
        yield made


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_process(four: Fleet, number: signal.Signals, index: int) -> None:
    pid = int(four.stages()[index]["pid"])
    four.check(load(four.urls(), lambda: four.send(number, [pid])))
    four.check_no_orphans()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("role", ["stage", "engine", "coordinator", "gateway"])
def test_a_whole_node(four: Fleet, number: signal.Signals, role: str) -> None:
    nodes = {"stage": STAGE, "engine": ENGINE, "gateway": GATEWAY}
    node = nodes[role] if role in nodes else four.coordinator()
    stages = four.stage_pids(node)
    agent = four.cluster.processes[node].pid
    # SIGTERM goes to the agent alone: its stage processes are its own to end.
    pids = [agent] if number is signal.SIGTERM else [agent, *stages]
    streams = load(four.urls(), lambda: four.send(number, pids))
    four.restore(node, number, pids)
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams) or role == "gateway"
    four.check_no_orphans()


@pytest.mark.parametrize("node", [ENGINE, STAGE])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_an_agent_alone(four: Fleet, number: signal.Signals, node: int) -> None:
    """Its stage process ends by itself; one that is stopped goes on only after the others have planned without it."""
    four.balanced()
    agent = four.cluster.processes[node].pid
    streams = load(four.urls(), lambda: four.send(number, [agent]))
    four.restore(node, number, [agent])
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams)
    four.check_no_orphans()
