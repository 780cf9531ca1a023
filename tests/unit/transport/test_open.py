"""Bringing up a stage's links: what is refused, what is left behind, and what is not imported."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from mlx_cluster.errors import LinkClosed, LinkUnavailable
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.plan import Epoch
from mlx_cluster.transport.grpc_link import GrpcSendEnd, HiddenStates, connect
from mlx_cluster.transport.link import HopId, StagePosition
from mlx_cluster.transport.open import Links, open_links
from tests.unit.transport.listening import listening

EPOCH = Epoch(1, 0)


def position(index: int, num_stages: int) -> StagePosition:
    return StagePosition("tiny", EPOCH, "plan", index, num_stages)


def test_a_position_names_both_of_its_hops() -> None:
    assert position(1, 3).hop_in == HopId("tiny", EPOCH, "plan", 0)
    assert position(1, 3).hop_out == HopId("tiny", EPOCH, "plan", 1)
    assert position(0, 3).hop_in is None
    assert position(2, 3).hop_out is None


async def test_one_stage_has_no_links() -> None:
    links = await open_links("grpc", position(0, 1), hidden=HiddenStates(), stage_addresses=[], timeout_seconds=1.0)
    assert links == Links(None, None)
    await links.close()


@pytest.mark.parametrize(
    ("kind", "addresses", "word"),
    [("smoke", ["a:1", "b:1"], "smoke"), ("grpc", ["a:1"], "addresses for 1")],
)
async def test_what_cannot_work_is_refused_at_once(kind: str, addresses: list[str], word: str) -> None:
    with pytest.raises(LinkUnavailable, match=word):
        await open_links(kind, position(0, 2), hidden=HiddenStates(), stage_addresses=addresses, timeout_seconds=1.0)


async def test_a_bring_up_that_fails_leaves_nothing_open() -> None:
    """The previous stage comes, the next one does not: the previous stage's stream ends too."""
    hidden = HiddenStates()
    middle = position(1, 3)
    assert middle.hop_in is not None
    async with listening(hidden) as address:
        previous = asyncio.create_task(connect(address, middle.hop_in, 30.0))
        with pytest.raises(LinkUnavailable, match=r"stage 2 at 127\.0\.0\.1:1"):
            await open_links(
                "grpc", middle, hidden=hidden, stage_addresses=[address, address, "127.0.0.1:1"], timeout_seconds=1.0
            )
        with pytest.raises(LinkClosed):
            await _send_for_ever(await previous)
        await (await previous).close()


async def _send_for_ever(end: GrpcSendEnd) -> None:
    while True:
        await end.send(Frame(1, (TensorSpec("uint8", (1,)),), b"x"), 30.0)


def test_a_grpc_stage_does_not_import_mlx() -> None:
    program = "import sys, mlx_cluster.transport.open; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
