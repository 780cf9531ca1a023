"""What must hold in every history. Sees everything that happens in a ``World`` and raises ``Broken``.

Knows nothing of how an election works: only who led, what was stored, what was committed, answered and obeyed.
"""

from __future__ import annotations

from mlx_cluster.cluster.document import ClusterDocument, accept
from mlx_cluster.cluster.election.values import NOTHING, Document, Version
from mlx_cluster.errors import Fenced


class Broken(AssertionError):
    """An invariant does not hold; the message says which and where."""


class Agent:
    """What stands for the agents: obeys orders with the fence that the product's agents use."""

    def __init__(self) -> None:
        self.document = ClusterDocument(cluster="sim")
        self.highest = NOTHING

    def obeys(self, version: Version) -> bool:
        """Whether it acts on the order; an order below the fence is refused."""
        try:
            self.document = accept(self.document, ClusterDocument("sim", term=version.term, version=version.index))
        except Fenced:
            return False
        return True


class Checker:
    def __init__(self) -> None:
        self.leaders: dict[tuple[object, int], str] = {}
        self.documents: dict[Version, Document] = {}
        self.stored: dict[Version, set[str]] = {}
        self.committed: dict[Version, Document] = {}
        self.last: Document | None = None
        self.made_from: dict[str, str] = {}  # body → the committed body it was proposed on
        self.founding_anew = False  # an operator has given up the voters that are gone
        self.lost: set[str] = set()  # voter ids whose disk is gone or went back in time

    # -- leaders -----------------------------------------------------------------------------------

    def leads(self, era: object, term: int, voter: str, document: Document) -> None:
        """Called whenever a voter is seen to lead."""
        other = self.leaders.setdefault((era, term), voter)
        if other != voter:
            raise Broken(f"two leaders in term {term}: {other} and {voter}")
        if voter in self.lost:
            raise Broken(f"{voter} leads term {term}, but its disk was lost")
        if self.last is None or term < self.last.version.term:
            return  # a deposed leader that has not heard of it yet may hold anything
        if document.version.index < self.last.version.index:
            raise Broken(f"{voter} leads term {term} with {document.version}, older than {self.last.version}")
        if not self._descends(document):
            raise Broken(f"{voter} leads term {term} with {document.body!r}, not made from {self.last.body!r}")

    def _descends(self, document: Document) -> bool:
        return self.last is None or self.last.body in (document.body, self.made_from.get(document.body))

    def _ancestry(self, body: str) -> set[str]:
        bodies = {body}
        while body in self.made_from:
            body = self.made_from[body]
            bodies.add(body)
        return bodies

    # -- documents ---------------------------------------------------------------------------------

    def saw(self, document: Document) -> None:
        """Called for every document that leaves a voter or reaches a disk."""
        other = self.documents.setdefault(document.version, document)
        if other != document:
            raise Broken(f"two documents carry {document.version}: {other.body!r} and {document.body!r}")

    def is_stored(self, voter: str, document: Document) -> None:
        self.saw(document)
        self.stored.setdefault(document.version, set()).add(voter)

    def acts_on(self, voter: str, document: Document, leads: bool) -> None:
        """Called for every ``Committed``."""
        if document.version in self.committed:
            return
        if not leads:
            raise Broken(f"{voter} acts on {document.version}, which no leader has committed")
        holders = self.stored.get(document.version, set())
        if not document.is_majority(holders):
            raise Broken(f"{document.version} was committed with {sorted(holders)} of {document.voter_sets}")
        if self.last is not None:
            if document.version < self.last.version:  # a deposed leader learns late that it had been committed
                if document.body not in self._ancestry(self.last.body):
                    raise Broken(f"{document.version} was committed after {self.last.version}, which lacks it")
                self.committed[document.version] = document
                return
            if not self._descends(document):
                raise Broken(f"{self.last.body!r} was committed and is lost: {document.body!r} does not come from it")
            before, after = set(self.last.voters), set(document.voters)
            if len(before ^ after) > 1 and not self.founding_anew:
                raise Broken(f"voters went from {sorted(before)} to {sorted(after)} in one step")
        self.saw(document)
        self.committed[document.version] = document
        self.last = document

    def answers(self, voter: str, document: Document) -> None:
        """Called for every answer that a lease has authorised."""
        if document is not self.last:
            raise Broken(f"{voter} answered {document.version}, but {self.last and self.last.version} was committed")

    def obeyed(self, agent: Agent, version: Version) -> None:
        if version not in self.committed:
            raise Broken(f"an agent obeyed {version}, which is not committed")
        if version < agent.highest:
            raise Broken(f"an agent obeyed {version} after {agent.highest}")
        agent.highest = version

    # -- what a fault may take -----------------------------------------------------------------------

    def may_lose(self, *voters: str) -> bool:
        """Whether every document that could still matter keeps a majority of intact disks, and one that may lead."""
        gone = self.lost.union(voters)
        least = self.last.version if self.last else NOTHING
        return all(
            document.is_majority({v for v in document.everyone if v not in gone})
            and not gone.union(document.witnesses).issuperset(document.voters)
            for version, document in self.documents.items()
            if version >= least
        )
