"""The rows of a stage: where each is, what its draws depend on, and what a header does to rows before its forward pass.

Owns: the rows, their groups and the entries of the prefix cache.
Does not own: the forward pass (``model.runner``), a group's batch (``model.cache``), an entry's data
(``model.prefix``).
Invariant: a row is in one place at most: its own caches, or a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_cluster import log
from mlx_cluster.errors import RowFailed
from mlx_cluster.microbatch import Kind, Load, Microbatch, RowSpec, Store, Trim
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import sampling
from mlx_cluster.model.cache import Caches, Group
from mlx_cluster.model.grammar import Grammars, RowGrammar
from mlx_cluster.model.prefix import Entries
from mlx_cluster.model.sampling import Draw
from mlx_cluster.model.slice import ModelSlice

# What a device that is out of memory, or a model's own code, may raise.
COMPUTE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)

logger = log.get("model.rows")


@dataclass(slots=True)
class Row:
    """A row's place (``caches`` of its own, or ``group``), its ``positions`` there, and what its draws depend on.

    ``draft`` are the last of these positions as long as nobody has said which of them stay.
    ``problem`` says why it cannot be executed; ``missing``, that it should have begun with an entry that is not here.
    """

    spec: RowSpec
    caches: Caches | None = None
    group: int | None = None
    positions: int = 0
    drawn: int = 0
    draft: tuple[int, ...] = ()
    seen: Counter[int] = field(default_factory=Counter)
    emitted: Counter[int] = field(default_factory=Counter)
    problem: str | None = None
    missing: bool = False
    total: Any = None  # the sum of its states so far, where they are averaged
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

    def draws(self, draft: Sequence[int]) -> list[Draw]:
        """The row's next draw and one behind each token of a draft; counts them all."""
        draws = [self.draw()]
        for token in draft:
            draw = self.draw()
            if self.spec.sampling.needs_history:
                more = Counter({token: 1})
                draw = replace(draw, seen=draws[-1].seen + more, emitted=draws[-1].emitted + more)
            draws.append(draw)
        return draws

    def settle(self) -> None:
        """What is left of the draft is what the row says."""
        draft, self.draft = self.draft, ()
        for token in draft:
            self.remember(token)
            if self.grammar is not None:
                self.grammar.consume(token)

    def remember(self, token: int) -> None:
        if self.spec.sampling.needs_history:
            self.seen[token] += 1
            self.emitted[token] += 1


class Rows:
    """All rows of a slice, by id."""

    def __init__(self, part: ModelSlice, grammars: Grammars | None) -> None:
        self._part, self._grammars = part, grammars
        self._rows: dict[int, Row] = {}
        self._groups: dict[int, Group] = {}
        self._cuts = row_cache.always_cuts(part.make_caches())
        self.entries = Entries(part.make_caches)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    @property
    def num_bytes(self) -> int:
        """What the caches of all rows take."""
        own = sum(row_cache.num_bytes(row.caches) for row in self._rows.values() if row.caches is not None)
        return own + sum(group.num_bytes for group in self._groups.values())

    def clear(self) -> None:
        """Forget all rows, groups and entries; entries on the disk stay."""
        self._rows.clear()
        self._groups.clear()
        self.entries.clear()

    def is_missing(self, row: int) -> bool:
        """Whether the row is to be passed over in silence."""
        return row in self._rows and self._rows[row].missing

    def change(self, header: Microbatch) -> tuple[int, ...]:
        """What a header asks for before the forward pass; the rows whose entry is missing."""
        for cut in header.trim:
            self._trim(cut)
        for name in header.rows:
            if name in self._rows:
                self._settle(self._rows[name])
        for item in header.store:
            self._store(item)
        for row in header.release:
            self._release(row)
        for entry in header.evict:
            self.entries.evict(entry)
        for spec in header.admit:
            self._admit(spec)
        return tuple(item.row for item in header.load if not self._load(item))

    def arrange(self, name: int, rows: Sequence[int], *, apart: bool = False) -> list[row_cache.Part]:
        """Make a group exactly these rows, in this order, wherever they are now; gives what to run.

        ``apart`` keeps each on caches of its own, which can be cut.
        """
        group = self._groups.setdefault(name, Group(batched=self._part.can_batch))
        joining = {row: self._leave(row) for row in rows if self._rows[row].group != name}
        for row, caches in group.arrange(rows, joining, apart=apart).items():
            self._rows[row].caches, self._rows[row].group = caches, None
        for row in rows:
            self._rows[row].caches, self._rows[row].group = None, name
        self._forget_empty_groups()
        return group.parts()

    def own_caches(self, row: int) -> Caches:
        """The row's own caches, empty when it begins; it leaves its group."""
        known = self._rows[row]
        if known.is_fresh:
            known.caches = self._part.make_caches()
        known.caches = self._leave(row)
        return known.caches

    def spoil(self, row: int, message: str) -> None:
        """The row cannot be executed any more; what it holds is freed."""
        known = self._rows.get(row)
        if known is None:
            return
        if known.group is not None and known.group in self._groups:
            self._groups[known.group].drop(row)
        known.caches, known.group, known.problem = None, None, message
        self._forget_empty_groups()

    def problem(self, header: Microbatch, row: int, tokens: Sequence[int]) -> str | None:
        """Why this row of the microbatch cannot be executed, if so."""
        known = self._rows.get(row)
        if known is None:
            return f"row {row} is not known here: it was never admitted, or is released"
        if known.problem is not None:
            return known.problem
        if header.kind in (Kind.DECODE, Kind.VERIFY) and known.is_fresh:
            return f"row {row} has no cache here: its prompt was not run"
        if header.kind is Kind.VERIFY and not self._cuts:
            return f"row {row} cannot try a draft: some cache of these layers cannot be cut"
        for token in tokens:
            if not 0 <= token < self._part.vocab_size:
                return f"token {token} is outside the vocabulary of {self._part.vocab_size}"
        return None

    def _admit(self, spec: RowSpec) -> None:
        row = Row(spec, problem=sampling.check_ids(spec.sampling, spec.history, self._part.vocab_size))
        if spec.sampling.needs_history:
            row.seen, row.emitted = Counter(spec.history), Counter(spec.history[spec.prompt_length :])
        if spec.grammar is not None and self._grammars is not None:
            emitted = spec.history[spec.prompt_length :]
            row.grammar = self._grammars.begin(spec.grammar, emitted, spec.stop_token_ids)
        self._rows[spec.row] = row

    def _trim(self, cut: Trim) -> None:
        """Take back what was rejected of the row's draft."""
        row = self._rows.get(cut.row)
        if row is None or row.missing or row.problem is not None:
            return
        surplus = row.positions - cut.length
        # Elsewhere than in a draft only where nothing is remembered of what was said.
        remembers = row.spec.sampling.needs_history or row.spec.grammar is not None
        most = len(row.draft) if remembers or not self._cuts else row.positions - 1
        caches = row.caches if row.group is None else self._groups[row.group].own(cut.row)
        if not 0 <= surplus <= most or caches is None:
            self.spoil(
                cut.row,
                f"row {cut.row} has {row.positions} positions, of which {most} can be taken back: it cannot be cut to "
                f"{cut.length}",
            )
            return
        if surplus:
            for cache in caches:
                cache.trim(surplus)
        row.positions -= surplus
        row.drawn = max(0, row.drawn - surplus)
        row.draft = row.draft[: max(0, len(row.draft) - surplus)]
        self._settle(row)

    def _settle(self, row: Row) -> None:
        try:
            row.settle()
        except RowFailed as error:
            row.problem = str(error)

    def _store(self, item: Store) -> None:
        """Keep a copy of a row, if there is one: who wants to begin with it is told otherwise."""
        row = self._rows.get(item.row)
        if row is None or row.is_fresh or row.problem is not None:
            return
        try:
            caches = row.caches if row.group is None else self._groups[row.group].peek(item.row)
            assert caches is not None
            self.entries.store(item.entry, caches, row.positions, item.saved)
        except COMPUTE_ERRORS as error:
            logger.warning("a prefix was not kept", row=item.row, positions=row.positions, error=str(error))

    def _load(self, item: Load) -> bool:
        row = self._rows.get(item.row)
        if row is None or not row.is_fresh:
            return False
        row.caches = self.entries.load(item.entry, item.length, item.digest)
        row.positions = item.length
        row.missing = row.caches is None
        return not row.missing

    def _release(self, row: int) -> None:
        known = self._rows.pop(row, None)
        if known is not None and known.group is not None:
            self._groups[known.group].drop(row)
            self._forget_empty_groups()

    def _forget_empty_groups(self) -> None:
        for name in [name for name, group in self._groups.items() if not group.rows]:
            del self._groups[name]

    def _leave(self, row: int) -> Caches:
        """A row's own caches, taken out of the group where it is."""
        known = self._rows[row]
        if known.group is not None:
            known.caches, known.group = self._groups[known.group].take(row), None
        assert known.caches is not None
        return known.caches
