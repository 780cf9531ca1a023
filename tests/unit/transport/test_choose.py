"""Which kind of link a plan uses, and why."""

from __future__ import annotations

import pytest

from mlx_cluster.errors import LinkUnavailable
from mlx_cluster.transport.choose import choose

BIG = [8, 8, 8]


def test_one_stage_needs_no_link_whatever_is_asked_for() -> None:
    assert choose("ring", num_stages=1, cores_per_stage=[1]).kind == "inprocess"


def test_auto_takes_the_ring_where_cores_are_free() -> None:
    assert choose("auto", num_stages=3, cores_per_stage=[2, 8, 8]).kind == "ring"


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"cores_per_stage": [8, 1, 8]}, "fewer than two cores"),
        ({"cores_per_stage": []}, "fewer than two cores"),
        ({"tls_required": True, "trusted": False}, "trusted_links"),
        ({"failed": {"ring": "port 18100 is taken"}}, "port 18100 is taken"),
        ({"available": {"grpc"}}, "cannot use the ring"),
    ],
)
def test_auto_falls_back_to_grpc_and_says_why(facts: dict[str, object], word: str) -> None:
    choice = choose("auto", **{"num_stages": 3, "cores_per_stage": BIG, **facts})  # type: ignore[arg-type]
    assert choice.kind == "grpc"
    assert word in choice.reason


def test_auto_keeps_the_ring_on_trusted_hops_though_tls_is_required() -> None:
    assert choose("auto", num_stages=2, cores_per_stage=BIG, tls_required=True, trusted=True).kind == "ring"


def test_a_kind_asked_for_by_name_is_used_even_where_auto_would_not() -> None:
    assert choose("ring", num_stages=3, cores_per_stage=[1, 1, 1]).kind == "ring"
    assert choose("mpi", num_stages=3, cores_per_stage=BIG, available={"ring", "grpc", "mpi"}).kind == "mpi"
    assert choose("grpc", num_stages=3, cores_per_stage=BIG, tls_required=True, trusted=False).kind == "grpc"


@pytest.mark.parametrize(
    ("requested", "facts", "remedy"),
    [
        ("mpi", {}, "mpirun"),
        ("jaccl", {}, "Thunderbolt 5"),
        ("nccl", {}, "CUDA"),
        ("ring", {"tls_required": True, "trusted": False}, "network.trusted_links"),
        ("ring", {"failed": {"ring": "a rank did not come"}}, "a rank did not come"),
        ("grpc", {"failed": {"grpc": "stage 2 did not answer"}}, "auto"),
    ],
)
def test_a_kind_asked_for_by_name_is_refused_not_replaced(
    requested: str, facts: dict[str, object], remedy: str
) -> None:
    with pytest.raises(LinkUnavailable, match=remedy):
        choose(requested, **{"num_stages": 3, "cores_per_stage": BIG, **facts})  # type: ignore[arg-type]
