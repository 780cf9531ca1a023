from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.discovery import (
    MAX_ADDRESSES,
    MAX_SERVICES,
    Announcement,
    Hints,
    Known,
    read,
    usable,
)

NODES = {1: Known("mini2", 8201, ("mini2.local:8201", "10.0.0.2:8201")), 2: Known("master", 8301, ("10.0.0.3:8301",))}


def said(node_id: int = 1, *addresses: str, **changes: object) -> Announcement:
    known = NODES.get(node_id, Known("mini1", 8101, ()))
    fields = {"cluster": "ours", "node_id": node_id, "name": known.name, "version": "1", "port": known.port}
    return Announcement(**{**fields, "addresses": addresses, **changes})  # type: ignore[arg-type]


def test_what_is_written_is_read() -> None:
    written = said(1, "192.168.1.2", "fd00::2")
    properties = {key.encode(): value.encode() for key, value in written.properties().items()}
    assert read(properties, written.port, written.addresses) == written


@pytest.mark.parametrize(
    "changes",
    [
        {b"cluster": None},
        {b"node_id": b"one"},
        {b"node_id": b"-1"},
        {b"node_id": b"1234"},
        {b"node_id": "²".encode()},
        {b"name": b"\xff"},
        {b"version": b"1\n2026-01-01 a line of its own"},
        {b"version": b"v" * 256},
    ],
)
def test_what_is_no_announcement_is_none(changes: dict[bytes, bytes | None]) -> None:
    properties = {key.encode(): value.encode() for key, value in said().properties().items()}
    assert read({**properties, **changes}, 8201, ()) is None
    assert read(properties, None, ()) is None
    assert read(properties, 8201, ["10.0.0.9"] * 100) == said(1, *["10.0.0.9"] * MAX_ADDRESSES)


@given(st.dictionaries(st.binary(max_size=9), st.none() | st.binary(max_size=300)), st.lists(st.text(max_size=40)))
def test_anything_may_come_over_the_network(properties: dict[bytes, bytes | None], addresses: list[str]) -> None:
    found = read({b"cluster": b"ours", b"node_id": b"1", b"name": b"mini2", b"version": b"1", **properties}, 8201, ())
    hints = Hints("ours", NODES)
    if found is not None:
        hints.heard("x", Announcement(**{**_fields(found), "addresses": tuple(addresses)}))
    assert all(len(hints.of(node)) <= MAX_ADDRESSES for node in NODES)
    assert all(each.endswith(":8201") for each in hints.of(1))


def _fields(announcement: Announcement) -> dict[str, object]:
    return {name: getattr(announcement, name) for name in ("cluster", "node_id", "name", "version", "port")}


def test_further_addresses_of_configured_nodes_are_learnt_and_forgotten() -> None:
    hints = Hints("ours", NODES)
    assert hints.of(1) == ()
    assert hints.heard("a", said(1, "10.0.0.2", "169.254.7.3", "fd00::2", "169.254.7.3")) == ""
    assert hints.of(1) == ("169.254.7.3:8201", "[fd00::2]:8201"), "and what is configured is no news"
    assert hints.heard("b", said(1, "192.168.1.2")) == ""
    assert hints.of(1) == ("169.254.7.3:8201", "[fd00::2]:8201", "192.168.1.2:8201")
    assert hints.heard("b", said(2, "192.168.1.3")) == "", "a service may say something else"
    assert (len(hints.of(1)), hints.of(2)) == (2, ("192.168.1.3:8301",))
    hints.gone("a")
    hints.gone("never heard of")
    assert hints.of(1) == ()


@pytest.mark.parametrize(
    ("announcement", "reason"),
    [
        (said(1, "1.2.3.4", cluster="theirs"), "another cluster"),
        (said(0, "1.2.3.4"), "this node itself, or none"),
        (said(9, "1.2.3.4"), "this node itself, or none"),
        (said(1, "1.2.3.4", name="mini3"), "as mini2 with comms port 8201"),
        (said(1, "1.2.3.4", port=22), "as mini2 with comms port 8201"),
    ],
)
def test_nobody_else_is_believed(announcement: Announcement, reason: str) -> None:
    hints = Hints("ours", NODES)
    hints.heard("a", said(1, "192.168.1.2"))
    assert reason in hints.heard("a", announcement)
    assert hints.of(1) == (), "nor what this service said before"
    assert hints.of(0) == hints.of(9) == ()


def test_a_flood_is_bounded() -> None:
    hints = Hints("ours", NODES)
    hints.heard("first", said(1, "192.168.1.2"))
    for number in range(2 * MAX_SERVICES):
        hints.heard(f"flood {number}", said(1, f"10.9.{number // 256}.{number % 256}"))
    assert len(hints.of(1)) == MAX_ADDRESSES
    assert hints.of(1)[0] == "192.168.1.2:8201"
    assert "remembered already" in hints.heard("one more", said(2, "192.168.1.3"))
    assert hints.heard("first", said(1, "192.168.1.4")) == "", "who is known may speak on"


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("192.168.1.2", "192.168.1.2"),
        ("169.254.7.3", "169.254.7.3"),
        ("fd00::2", "[fd00::2]"),
        ("fe80::1", None),
        ("::ffff:10.0.0.1", None),
        ("127.0.0.1", None),
        ("::1", None),
        ("0.0.0.0", None),
        ("224.0.0.251", None),
        ("255.255.255.255", None),
        ("ff02::fb", None),
        ("mini2.local", None),
        ("", None),
    ],
)
def test_only_what_may_be_another_machine_is_dialled(address: str, host: str | None) -> None:
    assert usable(address, loopback=False) == host
    assert usable("127.0.0.1", loopback=True) == "127.0.0.1"
