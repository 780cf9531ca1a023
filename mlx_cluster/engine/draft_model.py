"""A small model in a process of its own that says what the large one may say next.

Owns: one row for each sequence that it follows, what that row's caches hold, and the next header for it.
Does not own: the process (``node``), the stream to it (``send`` takes headers), whether a draft is tried
(``engine.speculation``). Pure but for ``send``.
Invariants: a row has one microbatch in flight at most; nothing here ever waits, and what comes late is only late.

The process is a stage process with every layer of the small model. A row reads the text that is certain and goes on
from there by itself, a token at a time, up to ``max_ahead`` tokens. Where the large model agrees, the next draft is
there already; where it does not, the row is cut back to what is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_cluster.microbatch import Kind, Microbatch, Report, RowSpec, Trim
from mlx_cluster.request import Sampling

MAX_ROWS = 8  # sequences that decode alone are few; a row holds a whole text
CHUNK = 256
_GREEDY = Sampling(temperature=0.0)


@dataclass(slots=True)
class _Row:
    """``text`` is what is certain and, from ``num_certain`` on, what the model believes comes next.

    The first ``num_fed`` tokens of it are in the row's caches, or on the way there; the caches hold ``num_computed``
    positions, which may be more: those behind ``num_fed`` are cut with the next header.
    """

    id: int
    text: list[int] = field(default_factory=list)
    num_certain: int = 0
    num_fed: int = 0
    num_computed: int = 0
    in_flight: bool = False
    draws_at: int = -1  # where in the text the token that is being drawn belongs; -1 when it is of no use any more
    failed: bool = False
    want: int = 0


class DraftModel:
    """Implements ``speculation.Drafts``. ``send`` takes the headers in order; each is answered by ``on_report``."""

    def __init__(self, send: Callable[[Microbatch], None], *, max_ahead: int) -> None:
        self._send = send
        self._max_ahead = max_ahead
        self._rows: dict[int, _Row] = {}  # by sequence
        self._in_flight: dict[int, _Row] = {}  # by microbatch
        self._release: list[int] = []
        self._next_row = self._next_microbatch = 0

    def follow(self, sequence: int, prompt: Sequence[int], output: Sequence[int], most: int) -> None:
        """The sequence's text is certain so far: cut what turned out wrong, and go on."""
        row = self._rows.get(sequence)
        if row is None:
            if len(self._rows) >= MAX_ROWS:
                return
            row = self._rows[sequence] = _Row(self._next_row)
            self._next_row += 1
        self._make_certain(row, prompt, output)
        row.want = min(most, self._max_ahead)
        self._go_on(row)

    def draft(self, sequence: int, most: int) -> tuple[int, ...]:
        """What it believes comes behind the text that it was last told."""
        row = self._rows.get(sequence)
        return tuple(row.text[row.num_certain : row.num_certain + most]) if row is not None else ()

    def is_close(self, sequence: int, most: int) -> bool:
        """Whether more of a draft of ``most`` tokens is on its way, and no long text is to be read before it."""
        row = self._rows.get(sequence)
        if row is None or not row.in_flight:
            return False
        return len(row.text) - row.num_certain < most and row.num_certain - row.num_fed <= self._max_ahead

    def forget(self, sequence: int) -> None:
        row = self._rows.pop(sequence, None)
        if row is None:
            return
        row.failed = True
        if row.num_computed:
            self._release.append(row.id)
            if not self._in_flight:
                self._dispatch(Kind.CONTROL, None)

    def on_report(self, report: Report) -> None:
        """A header was carried out; its row goes on with what was drawn, where that is still of use."""
        row = self._in_flight.pop(report.microbatch_id, None)
        if row is None:
            return
        row.in_flight = False
        row.failed = row.failed or bool(report.failed)
        if self._release and not self._in_flight:
            self._dispatch(Kind.CONTROL, None)
        if row.failed:
            return
        for drawn in report.sampled:
            if row.draws_at == len(row.text):
                row.text.append(drawn.token_id)
        self._go_on(row)

    def _make_certain(self, row: _Row, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Compare only what is new; cut the belief at the first token that is wrong."""
        length = len(prompt) + len(output)
        at = row.num_certain
        while at < length:
            token = prompt[at] if at < len(prompt) else output[at - len(prompt)]
            if at < len(row.text) and row.text[at] != token:
                del row.text[at:]
                row.draws_at = -1
                row.num_fed = min(row.num_fed, at)
            if at == len(row.text):
                if row.draws_at == at:
                    row.draws_at = -1
                row.text.append(token)
            at += 1
        row.num_certain = length

    def _go_on(self, row: _Row) -> None:
        if row.in_flight or row.failed:
            return
        if row.num_fed < row.num_certain:
            self._read(row)
        elif len(row.text) - row.num_certain < row.want and row.num_fed == len(row.text) - 1:
            row.draws_at = len(row.text)
            self._feed(row, Kind.DECODE, row.text[-1:])

    def _read(self, row: _Row) -> None:
        """A chunk of what is certain; behind the last one it draws."""
        tokens = row.text[row.num_fed : min(row.num_fed + CHUNK, row.num_certain)]
        last = row.num_fed + len(tokens) == row.num_certain
        row.draws_at = row.num_certain if last else -1
        self._feed(row, Kind.PREFILL, tokens, sample=last)

    def _feed(self, row: _Row, kind: Kind, tokens: Sequence[int], *, sample: bool = True) -> None:
        row.in_flight = True
        self._dispatch(kind, row, tokens, sample=sample)
        row.num_fed += len(tokens)
        row.num_computed = row.num_fed

    def _dispatch(self, kind: Kind, row: _Row | None, tokens: Sequence[int] = (), *, sample: bool = False) -> None:
        release, self._release = tuple(self._release), []
        admit: tuple[RowSpec, ...] = ()
        trim: tuple[Trim, ...] = ()
        if row is not None and row.num_computed == 0:
            admit = (RowSpec(row.id, _GREEDY, choice=0),)
        elif row is not None and row.num_computed > row.num_fed:
            trim = (Trim(row.id, row.num_fed),)
        microbatch = Microbatch(
            self._next_microbatch,
            kind,
            rows=(row.id,) if row is not None else (),
            tokens=tuple(tokens),
            group=row.id if row is not None else 0,
            sample=sample,
            admit=admit,
            release=release,
            trim=trim,
        )
        self._next_microbatch += 1
        if row is not None:
            self._in_flight[microbatch.id] = row
        self._send(microbatch)
