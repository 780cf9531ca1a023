"""What an election keeps: versions, the document with its voters, and the durable state.

Owns: the order of versions, the arithmetic of majorities, the JSON form of what is kept. Does not own: how it reaches
the disk (``cluster.stable``).
Invariant: a majority counts every voter set that is in force, so during a change of voters both sets must agree.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self


class Version(NamedTuple):
    """(term, index) of a document. The index also rises by one with every document, in any term."""

    term: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses here


NOTHING = Version(0, 0)


class Era(NamedTuple):
    """Which founding this cluster lives under: raised only by a forced recovery. (0, "") is a blank node."""

    number: int
    founder: str


BLANK = Era(0, "")


def node_of(voter: str) -> str:
    """The node part of a voter id ``node:disk``. A node that lost its disk returns with another disk part."""
    return voter.rpartition(":")[0]


def anybody_on(node: str) -> str:
    """A receiver that any voter id of this node answers to."""
    return f"{node}:"


@dataclass(frozen=True, slots=True)
class Document:
    """The cluster document as the election sees it: an opaque ``body`` and the voters who decide about it.

    ``previous`` is the voter set before a change, in force beside ``voters`` until the change is committed.
    ``witnesses`` vote and store but never lead. ``retired`` ids never vote again; ``vacant`` ones were retired because
    their disk was lost, and their node is owed the seat.
    """

    version: Version
    body: str
    voters: tuple[str, ...]
    previous: tuple[str, ...] = ()
    witnesses: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    vacant: tuple[str, ...] = ()

    @property
    def voter_sets(self) -> tuple[tuple[str, ...], ...]:
        return (self.voters, self.previous) if self.previous else (self.voters,)

    @property
    def everyone(self) -> tuple[str, ...]:
        """Voters of both sets, each once."""
        return tuple(dict.fromkeys((*self.voters, *self.previous))) if self.previous else self.voters

    def is_majority(self, voters: Container[str]) -> bool:
        """Whether these voters are more than half of every set in force."""
        return all(2 * sum(v in voters for v in one) > len(one) for one in self.voter_sets)

    def reached(self, times: Mapping[str, float]) -> float:
        """The latest moment that a majority of every set has reached; a voter without a time has reached none."""
        return min(
            sorted((times.get(voter, -math.inf) for voter in one), reverse=True)[len(one) // 2]
            for one in self.voter_sets
        )

    def next(self, term: int, **changes: Any) -> Document:
        """The successor of this document in ``term``."""
        return replace(self, version=Version(term, self.version.index + 1), **changes)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``dataclasses.asdict``. Raises ``ValueError`` on anything else."""
        if not isinstance(data["body"], str):
            raise ValueError(f"the body of a document is text, not {type(data['body']).__name__}")
        return cls(
            version=version_from_json(data["version"]),
            body=data["body"],
            **{name: _names(data[name]) for name in ("voters", "previous", "witnesses", "retired", "vacant")},
        )


@dataclass(frozen=True, slots=True)
class Durable:
    """Everything a voter must not forget, written as one.

    ``sequence`` counts the writes. ``seen`` holds the highest sequence heard from each other voter: a voter whose disk
    went back in time is recognised by it.
    """

    cluster: str
    voter: str
    era: Era = BLANK
    term: int = 0
    voted_for: str | None = None
    document: Document | None = None
    sequence: int = 0
    seen: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_json``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` on anything else."""
        document = data["document"]
        return cls(
            cluster=str(data["cluster"]),
            voter=str(data["voter"]),
            era=era_from_json(data["era"]),
            term=int(data["term"]),
            voted_for=None if data["voted_for"] is None else str(data["voted_for"]),
            document=None if document is None else Document.from_json(document),
            sequence=int(data["sequence"]),
            seen=tuple((str(voter), int(sequence)) for voter, sequence in data["seen"]),
        )


def version_from_json(data: Any) -> Version:
    term, index = data
    return Version(int(term), int(index))


def era_from_json(data: Any) -> Era:
    number, founder = data
    return Era(int(number), str(founder))


def _names(data: Any) -> tuple[str, ...]:
    if not isinstance(data, list | tuple) or not all(isinstance(name, str) for name in data):
        raise ValueError(f"not a list of voter ids: {data!r}")
    return tuple(data)
