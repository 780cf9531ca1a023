"""What voters say to each other, and its JSON form.

Owns: the closed set of messages. Does not own: how they travel; they may be lost, late, doubled or out of order.
Invariant: ``Message.from_text(message.to_text()) == message``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from mlx_cluster.cluster.election.values import Document, Era, Version, era_from_json, version_from_json


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Asks for a vote in the message's term. ``pre`` only asks whether it would be given and changes nothing.

    ``handed_over``: the leader of the term before has asked the sender to stand, so nobody waits for that leader.
    """

    version: Version
    pre: bool
    handed_over: bool = False


@dataclass(frozen=True, slots=True)
class VoteReply:
    """``document`` is handed to a candidate who was refused because its own is older."""

    granted: bool
    pre: bool
    document: Document | None = None


@dataclass(frozen=True, slots=True)
class Append:
    """The leader's heartbeat. ``sent_at`` is its own clock; ``document`` is there for who lacks it."""

    sent_at: float
    commit: Version
    document: Document | None = None


@dataclass(frozen=True, slots=True)
class AppendReply:
    """``sent_at`` comes back unchanged; ``accepted`` is what the sender has on its disk.

    ``sent_at`` is None where the heartbeat was of an older term: it may come from a former life of the receiver, on
    another clock, and nothing was promised for it.
    """

    sent_at: float | None
    accepted: Version


@dataclass(frozen=True, slots=True)
class HandOver:
    """The leader has stepped down in this term and asks the receiver to stand at once."""


@dataclass(frozen=True, slots=True)
class RollCall:
    """A voter that has just started asks what was last heard of it."""


@dataclass(frozen=True, slots=True)
class RollCallReply:
    """``seen`` is the highest write sequence heard from the receiver."""

    seen: int


@dataclass(frozen=True, slots=True)
class Join:
    """A node that holds no seat offers itself. Only a seat that its lost disk left vacant is given without an order."""


@dataclass(frozen=True, slots=True)
class Dismissal:
    """The receiver's id is retired: it may return only under a new one."""


Body = VoteRequest | VoteReply | Append | AppendReply | HandOver | RollCall | RollCallReply | Join | Dismissal


@dataclass(frozen=True, slots=True)
class Message:
    """``sequence`` counts the sender's durable writes at the moment of sending."""

    cluster: str
    era: Era
    sender: str
    receiver: str
    term: int
    sequence: int
    body: Body

    def to_text(self) -> str:
        data = asdict(self)
        data["kind"] = type(self.body).__name__
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Inverse of ``to_text``. Raises ``ValueError`` on anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(
                cluster=str(data["cluster"]),
                era=era_from_json(data["era"]),
                sender=str(data["sender"]),
                receiver=str(data["receiver"]),
                term=int(data["term"]),
                sequence=int(data["sequence"]),
                body=_BODIES[data["kind"]](data["body"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an election message: {error!r}") from error


def _document(data: Mapping[str, Any]) -> Document | None:
    return None if data["document"] is None else Document.from_json(data["document"])


_BODIES: dict[str, Callable[[Mapping[str, Any]], Body]] = {
    "VoteRequest": lambda d: VoteRequest(version_from_json(d["version"]), bool(d["pre"]), bool(d["handed_over"])),
    "VoteReply": lambda d: VoteReply(bool(d["granted"]), bool(d["pre"]), _document(d)),
    "Append": lambda d: Append(float(d["sent_at"]), version_from_json(d["commit"]), _document(d)),
    "AppendReply": lambda d: AppendReply(
        None if d["sent_at"] is None else float(d["sent_at"]), version_from_json(d["accepted"])
    ),
    "HandOver": lambda _: HandOver(),
    "RollCall": lambda _: RollCall(),
    "RollCallReply": lambda d: RollCallReply(int(d["seen"])),
    "Join": lambda _: Join(),
    "Dismissal": lambda _: Dismissal(),
}
