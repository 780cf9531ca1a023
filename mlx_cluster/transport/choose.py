"""Which kind of link a plan uses: a pure decision with its reason.

Owns: the rule behind ``network.transport: auto``, and the refusals of a kind that somebody asked for by name.
Does not own: bringing a link up (``open``), or finding out the facts it is given.
Invariant: a kind that was asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mlx_cluster.errors import LinkUnavailable

# mx.distributed backends: their bytes cross the network unencrypted.
MLX_KINDS = frozenset({"ring", "mpi", "jaccl", "nccl"})
ALWAYS_THERE = frozenset({"ring", "grpc"})

_HOW_TO_LAUNCH = {
    "mpi": "start the agents with one mpirun, ranks in the order of the stages",
    "jaccl": "start the agents with mlx.launch --backend jaccl on Macs joined by Thunderbolt 5 (macOS 26.2 or newer)",
    "nccl": "use nodes with one CUDA GPU each",
}


class Choice(NamedTuple):
    """``kind`` is ``inprocess``, ``grpc`` or an mlx backend; ``reason`` is a sentence for the operator."""

    kind: str
    reason: str


def choose(
    requested: str,
    *,
    num_stages: int,
    cores_per_stage: Sequence[int],
    tls_required: bool = False,
    trusted: bool = True,
    available: Collection[str] = ALWAYS_THERE,
    failed: Mapping[str, str] | None = None,
) -> Choice:
    """The kind of every link of one pipeline, and why.

    ``cores_per_stage`` holds, for each stage, the cores of its host divided by the stage processes there;
    ``trusted`` says that every hop is in ``network.trusted_links``; ``available`` are the kinds that all stages can
    bring up (mpi: every stage's agent is a rank of one mpirun, in stage order); ``failed`` maps a kind to why its
    last bring-up failed.

    Raises ``LinkUnavailable`` when ``requested`` is not ``auto`` and cannot be used.

    >>> choose("auto", num_stages=3, cores_per_stage=[10, 10, 10])
    Choice(kind='ring', reason='auto: every host has two cores or more for each stage')
    >>> choose("auto", num_stages=3, cores_per_stage=[0, 0, 0]).kind
    'grpc'
    """
    failures = failed or {}
    if num_stages == 1:
        return Choice("inprocess", "one stage needs no link")
    if requested != "auto":
        _check(requested, tls_required and not trusted, available, failures)
        return Choice(requested, f"network.transport asks for {requested}")
    if tls_required and not trusted:
        return Choice("grpc", "auto: TLS is required and a hop is not in network.trusted_links; the ring is plain TCP")
    if "ring" in failures:
        return Choice("grpc", f"auto: the ring could not be brought up: {failures['ring']}")
    if "ring" not in available:
        return Choice("grpc", "auto: a stage cannot use the ring")
    fewest = min(cores_per_stage, default=0)
    if fewest < 2:
        return Choice("grpc", "auto: a host has fewer than two cores for each stage, and a waiting ring keeps one busy")
    return Choice("ring", "auto: every host has two cores or more for each stage")


def _check(kind: str, must_encrypt: bool, available: Collection[str], failures: Mapping[str, str]) -> None:
    if kind in failures:
        raise LinkUnavailable(
            f"network.transport {kind} could not be brought up: {failures[kind]}; "
            "remove the cause, or set network.transport to auto"
        )
    if kind not in available:
        remedy = _HOW_TO_LAUNCH.get(kind, "choose one of " + ", ".join(sorted(available)))
        raise LinkUnavailable(
            f"network.transport {kind} is not available to every stage: {remedy}, or set network.transport to auto"
        )
    if kind in MLX_KINDS and must_encrypt:
        raise LinkUnavailable(
            f"network.transport {kind} cannot encrypt, and TLS is required: name the hops in network.trusted_links, "
            "or set network.transport to grpc"
        )
