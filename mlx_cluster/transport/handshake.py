"""The first array on an mlx link: epoch, plan and rank, because mlx messages carry no words of their own.

Invariant: always ``HANDSHAKE_BYTES`` long, whatever the pipeline's name, so that the receive can be posted blindly.
"""

from __future__ import annotations

import hashlib
import struct

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.plan import Epoch
from mlx_cluster.transport.link import StagePosition

# magic, version of the protocol, plan version, incarnation, rank, number of ranks, digest of pipeline and plan hash
_LAYOUT = struct.Struct("<4sIQQII16s")
_MAGIC = b"mlxc"
_VERSION = 1
HANDSHAKE_BYTES = _LAYOUT.size


def encode_handshake(position: StagePosition) -> bytes:
    return _LAYOUT.pack(
        _MAGIC,
        _VERSION,
        position.epoch.version,
        position.epoch.incarnation,
        position.index,
        position.num_stages,
        _digest(position),
    )


def check_handshake(mine: StagePosition, rank: int, theirs: bytes) -> None:
    """Raise ``LinkMismatch`` unless ``theirs`` is what stage ``rank`` of my pipeline, epoch and plan says."""
    magic, version, plan_version, incarnation, their_rank, num_stages, digest = _LAYOUT.unpack(theirs)
    if (magic, version) != (_MAGIC, _VERSION):
        raise LinkMismatch(f"rank {rank} speaks another handshake (version {version}): run the same release everywhere")
    epoch = Epoch(plan_version, incarnation)
    if epoch != mine.epoch:
        raise LinkMismatch(f"rank {rank} is in epoch {epoch}, stage {mine.index} in {mine.epoch}: start all anew")
    if (their_rank, num_stages) != (rank, mine.num_stages):
        raise LinkMismatch(f"rank {rank} of {mine.num_stages} takes itself for rank {their_rank} of {num_stages}")
    if digest != _digest(mine):
        raise LinkMismatch(f"rank {rank} follows another plan than stage {mine.index} ({mine.plan_hash})")


def _digest(position: StagePosition) -> bytes:
    return hashlib.sha256(f"{position.plan_hash}\n{position.pipeline}".encode()).digest()[:16]
