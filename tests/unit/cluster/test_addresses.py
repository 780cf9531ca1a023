from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.cluster.addresses import WINDOW, DialledAddresses, RankedAddresses

BRIDGE, HOST = "169.254.7.3:8101", "mini1.local:8101"


def look(ranked: RankedAddresses, **seconds: float | None) -> bool:
    ranked.measured(BRIDGE, seconds["bridge"])
    ranked.measured(HOST, seconds["host"])
    return ranked.rank()


def test_the_configured_host_is_dialled_until_something_is_measured() -> None:
    ranked = RankedAddresses(HOST, [BRIDGE, HOST])
    assert ranked.candidates == (BRIDGE, HOST)
    assert not ranked.rank()
    assert ranked.current == HOST
    assert not look(ranked, bridge=None, host=None)
    assert ranked.current == HOST


def test_the_quicker_address_wins_and_a_little_quicker_does_not() -> None:
    ranked = RankedAddresses(HOST, [BRIDGE])
    assert not look(ranked, bridge=0.0009, host=0.0010)
    assert not RankedAddresses(HOST, [BRIDGE]).rank()
    assert look(ranked, bridge=0.0003, host=0.0010)
    assert ranked.current == BRIDGE
    assert not look(ranked, bridge=0.0003, host=0.00025)


def test_tiny_differences_are_noise_whatever_their_share() -> None:
    ranked = RankedAddresses(HOST, [BRIDGE])
    assert not look(ranked, bridge=0.000020, host=0.000060)


def test_an_address_that_breaks_is_left_at_once_for_one_that_answers() -> None:
    ranked = RankedAddresses(HOST, [BRIDGE])
    assert look(ranked, bridge=0.0003, host=0.0010)
    assert look(ranked, bridge=None, host=0.0010)
    assert ranked.current == HOST
    assert look(ranked, bridge=0.0003, host=0.0010), "and taken again when it is back"
    assert not look(ranked, bridge=None, host=None)
    assert ranked.current == BRIDGE, "when none answers there is no reason to change"


def test_one_slow_handshake_says_nothing() -> None:
    ranked = RankedAddresses(HOST, [BRIDGE])
    assert look(ranked, bridge=0.0003, host=0.0010)
    for _ in range(WINDOW - 1):
        assert not look(ranked, bridge=0.5, host=0.0010)
    assert look(ranked, bridge=0.5, host=0.0010), "but a whole window of them does"


def test_a_hinted_address_is_dialled_only_while_no_configured_one_answers() -> None:
    ranked = RankedAddresses(HOST, [BRIDGE])
    ranked.hinted(["10.0.0.7:8101", HOST])
    assert ranked.candidates == (BRIDGE, HOST, "10.0.0.7:8101")
    ranked.measured("10.0.0.7:8101", 0.00001)
    assert not look(ranked, bridge=None, host=0.5), "however much quicker it is"
    assert look(ranked, bridge=None, host=None)
    assert ranked.current == "10.0.0.7:8101"
    assert look(ranked, bridge=None, host=0.5), "and left as soon as one does"
    assert look(ranked, bridge=None, host=None)
    ranked.hinted([])
    assert ranked.current == HOST, "a hint that is taken back is not dialled"
    assert ranked.seconds("10.0.0.7:8101") is None


MEASURED = st.one_of(st.none(), st.floats(1e-6, 1.0))


@given(st.lists(st.tuples(MEASURED, MEASURED), max_size=40))
def test_what_is_dialled_answers_when_anything_does(looks: list[tuple[float | None, float | None]]) -> None:
    ranked = RankedAddresses(HOST, [BRIDGE])
    for bridge, host in looks:
        before = ranked.current
        assert look(ranked, bridge=bridge, host=host) == (ranked.current != before)
        if bridge is not None or host is not None:
            assert ranked.seconds(ranked.current) is not None


def test_readers_follow_the_ranking() -> None:
    dialled = DialledAddresses({1: RankedAddresses(HOST, [BRIDGE]), 2: RankedAddresses("mini2.local:8201")})
    assert dict(dialled) == {1: HOST, 2: "mini2.local:8201"}
    assert dialled.of_port(1, "mini1.local:5001") == "mini1.local:5001"
    assert dialled.round_trips() == ()
    look(dialled.ranked[1], bridge=0.00030000049, host=0.0010)
    assert dict(dialled) == {1: BRIDGE, 2: "mini2.local:8201"}
    assert dialled.instead_of(HOST) == BRIDGE
    assert dialled.instead_of("somewhere:1") == "somewhere:1"
    assert dialled.of_port(1, "mini1.local:5001") == "169.254.7.3:5001"
    assert dialled.of_port(2, "mini2.local:5002") == "mini2.local:5002"
    assert dialled.of_port(0, "own:5000") == "own:5000"
    assert dialled.round_trips() == ((1, 0.0003),)
