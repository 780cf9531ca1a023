from __future__ import annotations

import importlib.util
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from mlx_cluster.cluster.discovery import Announcement, Hints, Known
from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import ConfigError
from mlx_cluster.node.discovery import Discovery, Reach, find_reach, make_discovery
from mlx_cluster.node.identity import identify

THERE = {"lo": ("127.0.0.1", "::1"), "en0": ("10.0.0.2", "fe80::1"), "bridge0": ("169.254.7.3", "fd00::2")}
PATIENCE_SECONDS = 30.0


def settings(**cluster: Any) -> Settings:
    nodes = [{"host": "127.0.0.1", "name": f"mini{i}", "node_id": i, "ports": [8100 + 100 * i]} for i in range(2)]
    interfaces = {f"mini{i}": {"interfaces": ["127.0.0.1"]} for i in range(2)}
    return Settings.model_validate({"cluster": {"name": "mdns", "nodes": nodes, **cluster}, "nodes": interfaces})


def test_every_interface_but_loopback_is_used_unless_some_are_named() -> None:
    def reach(*wanted: str, bind: str = "0.0.0.0") -> Reach:
        return find_reach(THERE, wanted, bind, "nodes.mini1.interfaces")

    assert reach() == Reach(("10.0.0.2", "169.254.7.3"), ("10.0.0.2", "169.254.7.3", "fd00::2"))
    assert reach("bridge0") == Reach(("169.254.7.3",), ("169.254.7.3", "fd00::2"))
    assert reach("10.0.0.2") == Reach(("10.0.0.2",), ("10.0.0.2",))
    assert reach(bind="10.0.0.2") == Reach(("10.0.0.2", "169.254.7.3"), ("10.0.0.2",)), "one that listens there only"
    assert reach(bind="127.0.0.1") == Reach(("10.0.0.2", "169.254.7.3"), ())
    assert reach("lo", bind="127.0.0.1") == Reach(("127.0.0.1",), ("127.0.0.1",))
    with pytest.raises(ConfigError, match=r"nodes\.mini1\.interfaces: .* no interface or address 'en9'; it has lo"):
        reach("en9")


def test_static_needs_nothing_and_mdns_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_discovery(settings(), identify(settings(), "0"), "1") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mlx-cluster\[discovery\]'"):
        make_discovery(settings(discovery="mdns"), identify(settings(), "0"), "1")


def test_what_is_advertised_follows_from_the_configuration() -> None:
    found = make_discovery(settings(discovery="mdns"), identify(settings(), "0"), "1")
    assert found is not None
    assert found._own == Announcement("mdns", 0, "mini0", "1", 8101, ("127.0.0.1",))
    found.stop()  # one that never started
    assert found.hints.heard("a", Announcement("mdns", 1, "mini1", "1", 8201, ("127.0.0.1", "10.0.0.7"))) == ""
    assert found.hints.of(1) == ("10.0.0.7:8201",)


def loopback_has_multicast() -> bool:
    """Whether a datagram to mDNS's group comes back on 127.0.0.1."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hears,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as says,
    ):
        try:
            hears.bind(("", 0))
            own = socket.inet_aton("127.0.0.1")
            hears.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.0.0.251") + own)
            says.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
            hears.settimeout(1.0)
            says.sendto(b"hello", ("224.0.0.251", hears.getsockname()[1]))
            return hears.recv(16) == b"hello"
        except OSError:
            return False


def test_two_nodes_find_each_other_on_loopback_and_nobody_of_another_cluster() -> None:
    if not loopback_has_multicast():
        pytest.skip("this machine's loopback interface carries no multicast")
    ours = f"ours-{secrets.token_hex(4)}"  # another run of this test may be on the same machine

    def node(node_id: int, cluster: str) -> Discovery:
        other = 1 - node_id
        hints = Hints(cluster, {other: Known(f"mini{other}", 8101 + 100 * other, ())}, loopback=True)
        own = Announcement(cluster, node_id, f"mini{node_id}", "1", 8101 + 100 * node_id, ("127.0.0.1",))
        return Discovery(own, ("127.0.0.1",), hints)

    first, second, stranger = node(0, ours), node(1, ours), node(1, f"not {ours}")
    for each in (first, second, stranger):
        each.start()
    try:
        eventually("they hear of each other", lambda: bool(first.hints.of(1) and second.hints.of(0)))
        assert (first.hints.of(1), second.hints.of(0)) == (("127.0.0.1:8201",), ("127.0.0.1:8101",))
        assert stranger.hints.of(0) == ()
        second.stop()
        eventually("the goodbye is heard", lambda: first.hints.of(1) == ())
    finally:
        for each in (first, second, stranger):
            each.stop()
    assert not any(each._thread.is_alive() for each in (first, second, stranger))


def eventually(what: str, probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not probe():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS:g} s"
        time.sleep(0.02)
