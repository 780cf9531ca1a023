"""What has happened lately, for a person who asks: each transition once as a log line, a metric and a row.

Owns: the bounded lists of elections, recoveries and transitions of this node. Does not own: who notices them.
Invariant: ``note`` is the only way in, so what is shown has been logged and counted, and the other way round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_cluster import log
from mlx_cluster.cluster.retry import BreakerState
from mlx_cluster.cluster.status import Recovery
from mlx_cluster.metrics import ClusterMetrics

MAX_ELECTIONS = 10
MAX_RECOVERIES = 10
MAX_TRANSITIONS = 50

Kind = Literal[
    "node_alive",
    "node_suspect",
    "node_dead",
    "node_left",
    "node_drained",
    "node_undrained",
    "coordinator_elected",
    "coordinator_lost",
    "quorum_lost",
    "quorum_regained",
    "document_committed",
    "voters_changed",
    "voter_retired",
    "cluster_founded",
    "pipeline_lost",
    "pipeline_back",
    "recovery",
    "circuit_open",
    "circuit_half_open",
    "circuit_closed",
]

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Election:
    """``node_id`` leads ``term`` since ``at`` (Unix seconds); ``seconds`` nobody led before; ``reason`` why it does."""

    node_id: int
    term: int
    at: float
    seconds: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Transition:
    at: float
    kind: Kind
    detail: dict[str, Any]


class History:
    """``wall`` gives Unix seconds."""

    def __init__(self, metrics: ClusterMetrics, wall: Callable[[], float] = time.time) -> None:
        self._metrics, self._wall = metrics, wall
        self._elections: deque[Election] = deque(maxlen=MAX_ELECTIONS)
        self._recoveries: deque[Recovery] = deque(maxlen=MAX_RECOVERIES)
        self._transitions: deque[Transition] = deque(maxlen=MAX_TRANSITIONS)

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        return tuple(self._recoveries)

    @property
    def elections(self) -> tuple[Election, ...]:
        return tuple(self._elections)

    def note(self, kind: Kind, **detail: Any) -> None:
        """One transition: a log line, a count, a row."""
        _log.info(kind.replace("_", " "), **detail)
        self._metrics.transitions.labels(kind).inc()
        self._transitions.append(Transition(self._wall(), kind, detail))

    def circuit(self, node: str, state: BreakerState, reason: str) -> None:
        """Control calls to ``node`` are refused at once (open), tried by one (half_open), or pass (closed)."""
        kinds: dict[BreakerState, Kind] = {
            "open": "circuit_open",
            "half_open": "circuit_half_open",
            "closed": "circuit_closed",
        }
        self.note(kinds[state], node=node, reason=reason)

    def elected(self, node_id: int, name: str, term: int, seconds: float | None, reason: str) -> None:
        self.note("coordinator_elected", node=name, term=term, reason=reason)
        self._elections.append(Election(node_id, term, self._wall(), seconds, reason))

    def recovered(self, pipeline: str, epoch: str, cause: str, seconds: float) -> None:
        """A pipeline that was lost ``seconds`` ago serves again; one node tells it (see ``recoveries``)."""
        self.note("recovery", pipeline=pipeline, epoch=epoch, cause=cause, seconds=round(seconds, 3))
        self._metrics.recovery_seconds.observe(seconds)
        self._recoveries.append(Recovery(pipeline, epoch, cause, round(seconds, 3), self._wall()))

    def to_json(self) -> dict[str, Any]:
        """Newest first."""
        return {
            "elections": [asdict(e) for e in reversed(self._elections)],
            "transitions": [{"at": t.at, "kind": t.kind, **t.detail} for t in reversed(self._transitions)],
        }
