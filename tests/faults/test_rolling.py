"""Every node is told to go and started again, one after the other, while clients keep coming: none of them notices."""

from __future__ import annotations

import threading

import pytest

from tests.faults.fleet import CELL_SECONDS, Stream, fleet, load

# One answer may outlive the restart of every node.
ROUND_SECONDS = 4 * CELL_SECONDS
pytestmark = pytest.mark.timeout(10 * CELL_SECONDS)


def test_a_rolling_restart_under_load(tmp_path_factory: pytest.TempPathFactory) -> None:
    with fleet(tmp_path_factory.mktemp("rolling"), "0/14/14/0") as four:
        rounds: list[list[Stream]] = []
        failures: list[BaseException] = []
        ending = threading.Event()
        urls = [four.cluster.gateway(node) for node in (3, 0, 1, 2)]

        def clients() -> None:
            try:
                while not ending.is_set():
                    rounds.append(load(urls, seconds=ROUND_SECONDS))
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=clients)
        thread.start()
        try:
            for node in range(4):
                four.balanced(busy=True)
                four.restart(node)
            four.balanced(busy=True)
        finally:
            ending.set()
            thread.join(ROUND_SECONDS)
        assert not thread.is_alive()
        assert failures == []
        assert rounds
        for streams in rounds:
            four.check(streams)
        four.check_no_orphans()  # at this quiet moment the pipeline is back where it was
