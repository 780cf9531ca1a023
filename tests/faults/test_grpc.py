"""Every role dies, hangs and is told to go, over gRPC links: sixteen streams go on as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.fleet import CELL_SECONDS, GATEWAY, STANDBY, Fleet, fleet, load

pytestmark = pytest.mark.timeout(6 * CELL_SECONDS)
SIGNALS = [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM]
ENGINE, STAGE = 1, 2
ROLES = {"stage": STAGE, "engine": ENGINE, "coordinator": STANDBY, "gateway": GATEWAY}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Nodes 1 and 2 hold the stages, 1 the engine; 3 is the clients' gateway, 0 stands by."""
    with fleet(tmp_path_factory.mktemp("fleet"), "0/14/14/0") as made:
        yield made


@pytest.fixture
def four(cluster: Fleet) -> Fleet:
    """The same with every role on a node of its own: the one that stands by coordinates."""
    cluster.lead(STANDBY)
    return cluster


def node_pids(four: Fleet, node: int, number: signal.Signals) -> list[int]:
    """What the signal goes to: SIGTERM to the agent alone, for its stage processes are its own to end."""
    agent = four.cluster.processes[node].pid
    return [agent] if number is signal.SIGTERM else [agent, *four.stage_pids(node)]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_process(four: Fleet, number: signal.Signals, index: int) -> None:
    pid = int(four.stages()[index]["pid"])
    streams = load(four.urls(), lambda: four.send(number, [pid]))
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams)
    four.check_no_orphans()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("role", ROLES)
def test_a_whole_node(four: Fleet, number: signal.Signals, role: str) -> None:
    node = ROLES[role]
    streams = four.strike(node, number, node_pids(four, node, number))
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams) or role == "gateway"
    four.check_no_orphans()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
def test_a_node_that_is_coordinator_engine_and_gateway(cluster: Fleet, number: signal.Signals) -> None:
    cluster.lead(ENGINE)
    streams = cluster.strike(ENGINE, number, node_pids(cluster, ENGINE, number), first=ENGINE)
    cluster.check(streams)
    cluster.check_no_orphans()


@pytest.mark.parametrize("node", [ENGINE, STAGE], ids=["engine", "stage"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_an_agent_alone(four: Fleet, number: signal.Signals, node: int) -> None:
    """Its stage process ends by itself; one that is stopped goes on only after the others have planned without it."""
    streams = four.strike(node, number, [four.cluster.processes[node].pid])
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams)
    four.check_no_orphans()


def test_a_coordinator_without_a_stage_costs_its_streams_nothing(four: Fleet) -> None:
    """Between the signal and the last token: the same epoch and processes, no row preempted, nothing computed again."""
    before, figures = four.balanced(), list[dict[str, Any]]()
    agent = four.cluster.processes[STANDBY].pid
    streams = four.strike(STANDBY, signal.SIGKILL, [agent], just_before=lambda: figures.append(four.figures(ENGINE)))
    figures.append(four.figures(ENGINE))
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams)
    for counter in ("preemptions", "prefilled_tokens", "prefix_fallbacks"):
        assert figures[0][counter] == figures[1][counter], counter
    assert figures[1]["tokens"] > figures[0]["tokens"]
    after = four.balanced()
    assert after["epoch"] == before["epoch"]
    assert [stage["pid"] for stage in after["stages"]] == [stage["pid"] for stage in before["stages"]]
