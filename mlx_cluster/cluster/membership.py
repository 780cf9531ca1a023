"""Which nodes are alive, by their heartbeats.

Owns: the table of nodes and the rules of suspicion, death, reboot and version. Pure: time is an argument.
Does not own: who leads (``leader``), what is done about a death (``coordinator``), how heartbeats travel (``rpc``).
Invariant: a node's status never goes back: an older sequence of the same boot, or any word of an earlier boot, is
dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from mlx_cluster.cluster.status import NodeStatus
from mlx_cluster.errors import ConfigError, Fenced

NodeState = Literal["alive", "suspect", "dead"]
SUSPECT_AFTER_MISSED = 2
MAX_EARLIER_BOOTS = 64  # remembered per node, to drop their late words


@dataclass(frozen=True, slots=True)
class Member:
    """A configured node: who it is and where to dial it."""

    node_id: int
    name: str
    host: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """One row of the table. ``status`` is the last one heard; ``detail`` says why a node is not alive."""

    member: Member
    state: NodeState
    status: NodeStatus | None
    detail: str = ""
    silent_seconds: float = 0.0

    @property
    def node_id(self) -> int:
        return self.member.node_id


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The table at one moment, in order of node ids. ``self_id`` is the node that looks."""

    self_id: int
    nodes: tuple[NodeView, ...]

    def node(self, node_id: int) -> NodeView | None:
        return next((n for n in self.nodes if n.node_id == node_id), None)

    def name_of(self, node_id: int) -> str:
        node = self.node(node_id)
        return node.member.name if node else f"node {node_id}"

    @property
    def living(self) -> tuple[NodeStatus, ...]:
        """Statuses of the nodes that are not dead: a suspect is not buried yet."""
        return tuple(n.status for n in self.nodes if n.state != "dead" and n.status is not None)

    def is_dead(self, node_id: int) -> bool:
        node = self.node(node_id)
        return node is None or node.state == "dead"


@dataclass(slots=True)
class _Row:
    member: Member
    last_heard: float
    status: NodeStatus | None = None
    refusal: str = ""
    vanished: bool = False  # since it was last heard its port has refused connections
    earlier_boots: list[str] = field(default_factory=list)


class Membership:
    """The table of one node. It starts with everybody dead but unheard; a heartbeat makes a node alive.

    ``interval_seconds`` is the period of heartbeats, ``failure_threshold`` how many missed ones mean death.
    """

    def __init__(
        self,
        self_id: int,
        members: Iterable[Member],
        version: str,
        interval_seconds: float,
        failure_threshold: int,
        now: float,
    ) -> None:
        self._self_id = self_id
        self._version = version
        self._interval = interval_seconds
        self._death_seconds = interval_seconds * failure_threshold
        self._suspect_seconds = interval_seconds * min(SUSPECT_AFTER_MISSED, failure_threshold)
        self._rows = {m.node_id: _Row(m, now) for m in sorted(members, key=lambda m: m.node_id)}
        self._last_tick = now
        if self_id not in self._rows:
            raise ConfigError(f"node {self_id} is not among the configured nodes {sorted(self._rows)}")

    def check_version(self, node_id: int, version: str) -> None:
        """Raise ``ConfigError`` naming both versions unless the node runs ours."""
        if version == self._version:
            return
        row = self._row(node_id)
        row.refusal = (
            f"{row.member.name} runs {version}, {self._rows[self._self_id].member.name} runs {self._version}: "
            "install the same versions on every node"
        )
        raise ConfigError(row.refusal)

    def heard(self, status: NodeStatus, now: float) -> bool:
        """Take a status. False when it is an older one of the same boot, and changes nothing.

        Raises ``ConfigError`` for an unknown node or another version, ``Fenced`` for a boot that has been replaced.
        """
        self.check_version(status.node_id, status.version)
        row = self._row(status.node_id)
        if status.boot_id in row.earlier_boots:
            current = row.status.boot_id if row.status else "another"
            raise Fenced(
                f"{row.member.name} has been started again (boot {current}); "
                f"the process of boot {status.boot_id} (pid {status.pid}) must end"
            )
        if row.status is not None and row.status.boot_id == status.boot_id:
            if status.sequence <= row.status.sequence:
                return False
        elif row.status is not None:
            row.earlier_boots = [*row.earlier_boots, row.status.boot_id][-MAX_EARLIER_BOOTS:]
        row.status, row.last_heard, row.refusal, row.vanished = status, now, "", False
        return True

    def vanished(self, node_id: int, since: float) -> None:
        """Nobody listens at the node's addresses any more: it is dead, unless it was heard after ``since``."""
        row = self._row(node_id)
        row.vanished = row.vanished or row.last_heard <= since

    def tick(self, now: float) -> ClusterView:
        """The table now; call it at least once per interval.

        A caller that comes late (stopped, asleep) has not heard anybody meanwhile, which says nothing of the others:
        everybody who was alive gets a whole new period before being suspected.
        """
        if now - self._last_tick > 2 * self._interval:
            for row in self._rows.values():
                if self._state(row, self._last_tick) != "dead":
                    row.last_heard = max(row.last_heard, now)
        self._last_tick = now
        return self.view(now)

    def view(self, now: float) -> ClusterView:
        return ClusterView(
            self._self_id,
            tuple(
                NodeView(row.member, self._state(row, now), row.status, self._detail(row, now), now - row.last_heard)
                for row in self._rows.values()
            ),
        )

    def _row(self, node_id: int) -> _Row:
        row = self._rows.get(node_id)
        if row is None:
            raise ConfigError(
                f"node {node_id} is not among the configured nodes {sorted(self._rows)}: "
                "add it to cluster.yaml on every node",
                key="cluster.nodes",
            )
        return row

    def _state(self, row: _Row, now: float) -> NodeState:
        if row.member.node_id == self._self_id and row.status is not None:
            return "alive"
        silence = now - row.last_heard
        if row.status is None or row.status.leaving or row.vanished or silence > self._death_seconds:
            return "dead"
        return "suspect" if silence > self._suspect_seconds else "alive"

    def _detail(self, row: _Row, now: float) -> str:
        if row.refusal:
            return row.refusal
        if row.status is None:
            return "not heard yet"
        if row.status.leaving:
            return "has left"
        if self._state(row, now) == "alive":
            return ""
        if row.vanished:
            return "refuses connections"
        return f"silent for {now - row.last_heard:.1f} s"
