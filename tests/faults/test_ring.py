"""The ring with two stages: whatever breaks starts every stage process again, and streams go on all the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.faults.fleet import CELL_SECONDS, Fleet, fleet, load

pytestmark = pytest.mark.timeout(4 * CELL_SECONDS)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Nodes 1 and 2 hold the stages; 0 and 3 hold none."""
    with fleet(tmp_path_factory.mktemp("ring"), "0/14/14/0", transport="ring") as made:
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
@pytest.mark.parametrize("whole", [False, True], ids=["stage", "node"])
def test_the_second_stage(ring: Fleet, number: signal.Signals, whole: bool) -> None:
    pids = ring.stage_pids(2)
    if whole:
        streams = ring.strike(2, number, [ring.cluster.processes[2].pid, *pids])
    else:
        streams = load(ring.urls(), lambda: ring.send(number, pids))
    ring.check(streams)
    assert all(stream.reconnects == 0 for stream in streams)
    ring.check_no_orphans()
