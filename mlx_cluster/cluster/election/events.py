"""What goes into an election and what comes out.

Owns: the closed sets ``Event`` and ``Effect`` and the ``Settings``. Whoever runs an ``Election`` carries out its
effects in order and hands back ``Persisted`` when a write is on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_cluster.cluster.election.messages import Message
from mlx_cluster.cluster.election.values import Document, Durable, Version

# -- in ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of the last ``SetTimer`` has come."""


@dataclass(frozen=True, slots=True)
class Blind:
    """A ``Tick`` while nothing can be heard: whoever takes in the messages of this voter is held up.

    A leader goes on with its heartbeats, and nobody is blamed for a silence that is this voter's own.
    """


@dataclass(frozen=True, slots=True)
class Persisted:
    """The ``Durable`` with this sequence is on the disk, for good."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Propose:
    """A new body for the document. ``base`` is the committed version it was made from."""

    body: str
    base: Version


@dataclass(frozen=True, slots=True)
class AddVoter:
    voter: str
    witness: bool = False


@dataclass(frozen=True, slots=True)
class RemoveVoter:
    voter: str


@dataclass(frozen=True, slots=True)
class TransferTo:
    voter: str


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The first voter set, given once in the life of a cluster, to one of its voters."""

    voters: tuple[str, ...]
    body: str
    witnesses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ForceNewCluster:
    """Quorum is lost for good: go on alone with what is here. Refused while another voter answers."""


@dataclass(frozen=True, slots=True)
class SetPriority:
    """0…1: who is higher stands earlier when there is no leader."""

    priority: float


@dataclass(frozen=True, slots=True)
class Knock:
    """Ask these nodes for a seat, because this one has none."""

    nodes: tuple[str, ...]


Command = Propose | AddVoter | RemoveVoter | TransferTo | Bootstrap | ForceNewCluster
Event = Tick | Blind | Persisted | Message | Command | SetPriority | Knock

# -- out ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    message: Message


@dataclass(frozen=True, slots=True)
class Persist:
    """Write this as one; answer ``Persisted(durable.sequence)``. At most one is under way."""

    durable: Durable


@dataclass(frozen=True, slots=True)
class BecomeLeader:
    """This voter leads ``term`` and its re-committed document: from here on it may act."""

    term: int


@dataclass(frozen=True, slots=True)
class StepDown:
    """This voter no longer leads ``term``. What it proposed last may or may not be committed by its successor."""

    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class Committed:
    """The document is decided: agents act on it."""

    document: Document


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Hand in a ``Tick`` at this time; it replaces the timer before it."""

    at: float


@dataclass(frozen=True, slots=True)
class Refused:
    command: Command
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """This voter id must not be used again: start with a blank state and a new disk part."""

    reason: str


Effect = Send | Persist | BecomeLeader | StepDown | Committed | SetTimer | Refused | Retire


@dataclass(frozen=True, slots=True)
class Settings:
    """Times of an election. ``max_drift`` is how far two clocks' rates may be from true (0.05: five per cent)."""

    heartbeat_seconds: float = 0.3
    timeout_min_seconds: float = 1.5
    timeout_max_seconds: float = 3.0
    max_drift: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < 2 * self.heartbeat_seconds <= self.timeout_min_seconds < self.timeout_max_seconds:
            raise ValueError(
                f"heartbeat {self.heartbeat_seconds} s, time-out {self.timeout_min_seconds}…{self.timeout_max_seconds}"
                " s: two heartbeats must fit the shortest time-out, and the longest must be longer"
            )

    @property
    def lease_seconds(self) -> float:
        """How long a heartbeat's answer lets the leader answer.

        A voter keeps its promise for ``timeout_min_seconds`` of its own clock, which may run fast, counted from when
        the heartbeat arrived; the leader, whose clock may run slow, counts from when it was sent.
        """
        return self.timeout_min_seconds * (1 - self.max_drift) / (1 + self.max_drift)

    @property
    def late_seconds(self) -> float:
        """A loop that wakes this much later than planned has slept."""
        return self.timeout_min_seconds / 2

    def delay_seconds(self, priority: float, chance: float) -> float:
        """How long to wait for a leader: between the time-outs, sooner with priority, spread by ``chance`` (0…1)."""
        spread = self.timeout_max_seconds - self.timeout_min_seconds
        return self.timeout_min_seconds + spread * ((1 - priority) + chance) / 2
