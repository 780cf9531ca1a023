"""What a stage remembers of one row besides its group's arrangement.

Owns: a row's place, its length and what its next draw depends on.
Invariant: a row is in one place at most: its own caches, or a group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlx_cluster.microbatch import RowSpec
from mlx_cluster.model.cache import Caches
from mlx_cluster.model.grammar import RowGrammar
from mlx_cluster.model.sampling import Draw


@dataclass(slots=True)
class Row:
    """A row's place (``caches`` of its own, or ``group``), its ``positions`` there, and what its draws depend on.

    ``problem`` says why it cannot be executed; ``missing``, that it should have begun with an entry that is not here.
    """

    spec: RowSpec
    caches: Caches | None = None
    group: int | None = None
    positions: int = 0
    drawn: int = 0
    seen: Counter[int] = field(default_factory=Counter)
    emitted: Counter[int] = field(default_factory=Counter)
    problem: str | None = None
    missing: bool = False
    grammar: RowGrammar | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether nothing of it was computed."""
        return self.caches is None and self.group is None

    def draw(self) -> Draw:
        """The row's next draw; counts it."""
        index = self.spec.first_index + self.drawn
        self.drawn += 1
        return Draw(self.spec.sampling, self.spec.choice, index, self.seen, self.emitted)

    def remember(self, token: int) -> None:
        if self.spec.sampling.needs_history:
            self.seen[token] += 1
            self.emitted[token] += 1
