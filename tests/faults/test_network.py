"""What a network does instead of dying: each control and data link loses, delays, halves and resets; no stream notices.

Nodes are dialled at an address where proxies listen, one for each; their processes listen behind it. The fault holds
for longer than a frozen stage is waited for, then the link is whole again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from mlx_cluster import demo
from tests.e2e.cluster_processes import ClusterProcesses, running
from tests.faults.fleet import CELL_SECONDS, TOKENS, Fleet, bodies, load
from tests.faults.tcp_proxy import Mode, TcpProxy

pytestmark = pytest.mark.timeout(4 * CELL_SECONDS)
ENGINE, STAGE = 1, 2
COMMS, DATA = 1, 3  # offsets of a node's ports
FAULT_SECONDS = 8.0
ASKED = bodies()[::2]  # four greedy and four seeded
MODES: tuple[Mode, ...] = ("drop", "delay", "half", "reset")


@dataclass(slots=True)
class ProxiedFleet(Fleet):
    """A fleet whose nodes reach each other through proxies only."""

    proxies: list[TcpProxy] = field(default_factory=list)

    def fault(self, node: int, offset: int, mode: Mode, heal: threading.Event) -> None:
        """Break the links to one port of a node, and heal them after a while."""
        port = self.cluster.first_port + 5 * node + offset
        self.proxies[node].set(mode, port)

        def mend() -> None:
            self.proxies[node].set("pass", port)
            heal.set()

        threading.Timer(FAULT_SECONDS, mend).start()


def _behind_proxies(cluster: ClusterProcesses) -> list[TcpProxy]:
    """Rewrite the configuration so that nodes are dialled at another address than the one they listen on."""
    path = cluster.folder / "cluster.yaml"
    tree = yaml.safe_load(path.read_text())
    proxies = []
    for node in tree["cluster"]["nodes"]:
        node["host"] = "127.0.1.2"  # one for all: nodes of one host have gateway ports of their own
        tree["nodes"][node["name"]]["bind"] = "127.0.0.1"
        proxies.append(TcpProxy(node["host"], "127.0.0.1", node["ports"]))
    path.write_text(yaml.safe_dump(tree))
    return proxies


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedFleet]:
    folder: Path = tmp_path_factory.mktemp("network")
    split = "0/14/14/0"
    settings = {
        "runtime": {"blas": "off"},
        "network": {"transport": "grpc"},
        "coordinator": {"quiet_period": 0.5},
    }
    cluster = ClusterProcesses(folder, demo.model_dir(), num_nodes=4, split=split, settings=settings)
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(proxy) for proxy in _behind_proxies(cluster)]
        stack.enter_context(running(cluster))
        made = ProxiedFleet(cluster, split)
        made.proxies = proxies
        made.balanced()
        made.reference = [stream.tokens for stream in load(made.urls(), asked=ASKED)]
        assert all(len(tokens) == TOKENS for tokens in made.reference)
        assert all(proxy.num_connections for proxy in proxies), "the nodes do not go through the proxies"
        yield made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [COMMS, DATA], ids=["control", "data"])
@pytest.mark.parametrize("node", [ENGINE, STAGE], ids=["engine", "stage"])
def test_a_link_breaks_and_heals(four: ProxiedFleet, node: int, offset: int, mode: Mode) -> None:
    four.balanced()
    healed = threading.Event()
    streams = load(four.urls(), lambda: four.fault(node, offset, mode, healed), ASKED)
    assert healed.wait(CELL_SECONDS)
    four.check(streams)
    assert all(stream.reconnects == 0 for stream in streams)
    four.balanced()
    four.check_no_orphans()
