"""What two ranks tell each other before the first hidden state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.plan import Epoch
from mlx_cluster.transport.handshake import HANDSHAKE_BYTES, check_handshake, encode_handshake
from mlx_cluster.transport.link import StagePosition

MINE = StagePosition("qwen", Epoch(3, 1), "0123456789abcdef", 1, 3)
NEIGHBOUR = replace(MINE, index=2)


def test_a_neighbour_of_the_same_plan_and_epoch_is_accepted() -> None:
    check_handshake(MINE, 2, encode_handshake(NEIGHBOUR))


@pytest.mark.parametrize(
    ("theirs", "word"),
    [
        (replace(NEIGHBOUR, epoch=Epoch(3, 0)), "epoch 3.0"),
        (replace(NEIGHBOUR, epoch=Epoch(4, 1)), "epoch 4.1"),
        (replace(NEIGHBOUR, plan_hash="another"), "another plan"),
        (replace(NEIGHBOUR, pipeline="llama"), "another plan"),
        (replace(NEIGHBOUR, index=0), "rank 0"),
        (replace(NEIGHBOUR, num_stages=4), "of 4"),
    ],
)
def test_any_difference_is_a_mismatch(theirs: StagePosition, word: str) -> None:
    with pytest.raises(LinkMismatch, match=word):
        check_handshake(MINE, 2, encode_handshake(theirs))


def test_hidden_state_bytes_in_its_place_are_a_mismatch() -> None:
    with pytest.raises(LinkMismatch, match="another handshake"):
        check_handshake(MINE, 2, bytes(HANDSHAKE_BYTES))
