"""What this node says of itself: the numbers of its machine, and the status that goes into every heartbeat.

Owns: boot id, sequence, memory budget, load, health. Does not own: who hears it (``cluster.rpc``).
Invariant: the sequence rises with every status, so that a late one is known for what it is.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

from mlx_cluster.cluster.document import ClusterDocument
from mlx_cluster.cluster.leader import Leadership
from mlx_cluster.cluster.status import NodeStatus, PipelineStatus, Recovery, StageStatus
from mlx_cluster.config.names import settings_of_node
from mlx_cluster.config.quantity import parse_bytes
from mlx_cluster.config.schema import Settings
from mlx_cluster.node import machine
from mlx_cluster.node.identity import Identity
from mlx_cluster.node.models import LocalModels
from mlx_cluster.node.mpi import rank_and_size
from mlx_cluster.plan import Epoch

LATE_SECONDS = 1.0  # an event loop that wakes up so much too late has no health left
SHORT_OF_MEMORY = 0.05  # below this share of free memory a node is about to swap


@dataclass(frozen=True, slots=True)
class Voice:
    """This node's place in the election, for its status."""

    voter: str = ""
    founded: bool = False
    backs: str = ""


class OwnWord:
    """Made once per boot; ``look`` reads the machine, ``say`` makes the next status."""

    def __init__(self, settings: Settings, identity: Identity, version: str) -> None:
        self._identity, self._version = identity, version
        self.boot_id, self._sequence = secrets.token_hex(6), 0
        budget = settings_of_node(settings, identity.entry).memory_budget
        self._total_bytes = min(machine.total_bytes(), parse_bytes(budget)) if budget else machine.total_bytes()
        self.speed_bytes_per_second = 0.0  # measured at join
        self.late_seconds = 0.0  # how late the event loop woke up last
        self.look()

    def look(self) -> None:
        """Read what changes slowly; blocks for a moment."""
        self._free_bytes, self._load = machine.free_bytes(), machine.load()

    def say(
        self,
        leadership: Leadership,
        voice: Voice,
        document: ClusterDocument,
        models: LocalModels,
        *,
        stages: tuple[StageStatus, ...],
        pipelines: tuple[PipelineStatus, ...],
        epochs: tuple[tuple[str, Epoch], ...],
        unplaced: tuple[tuple[str, str], ...],
        recoveries: tuple[Recovery, ...] = (),
        round_trips: tuple[tuple[int, float], ...] = (),
        leaving: bool = False,
        draining: bool = False,
    ) -> NodeStatus:
        identity = self._identity
        self._sequence += 1
        # A budget caps what stages may take together; what they hold already is no longer free.
        free = min(self._free_bytes, max(0, self._total_bytes - sum(s.memory_bytes for s in stages)))
        return NodeStatus(
            node_id=identity.node_id,
            name=identity.name,
            pid=os.getpid(),
            host=identity.host,
            machine=machine.name(),
            boot_id=self.boot_id,
            sequence=self._sequence,
            version=self._version,
            gateway_url=identity.gateway_url,
            admin_url=identity.admin_url,
            comms_address=identity.comms_address,
            memory_total_bytes=self._total_bytes,
            memory_free_bytes=free,
            cores=machine.cores(),
            transports=machine.transports(),
            mpi=rank_and_size(os.environ),
            leader=leadership.node_id,
            term=leadership.term,
            document=document.rank,
            document_hash=document.hash(),
            models=models.facts,
            missing=models.missing,
            stages=stages,
            pipelines=pipelines,
            epochs=epochs,
            unplaced=unplaced,
            voter=voice.voter,
            founded=voice.founded,
            backs=voice.backs,
            health=health(
                self.late_seconds,
                self._free_bytes / machine.total_bytes(),
                sum(s.state == "failed" for s in stages),
                len(stages),
            ),
            load=self._load,
            leaving=leaving,
            speed_bytes_per_second=self.speed_bytes_per_second,
            draining=draining,
            recoveries=recoveries,
            round_trips=round_trips,
            machine_free_bytes=self._free_bytes,
        )


def health(late_seconds: float, free_share: float, num_failed: int, num_stages: int) -> float:
    """0…1: the worst of a late event loop, short memory and stages that failed, rounded so that noise is no change."""
    punctual = 1.0 - min(1.0, max(0.0, late_seconds) / LATE_SECONDS)
    roomy = min(1.0, max(0.0, free_share) / SHORT_OF_MEMORY)
    sound = 1.0 - num_failed / num_stages / 2 if num_stages else 1.0
    return round(min(punctual, roomy, sound), 1)
