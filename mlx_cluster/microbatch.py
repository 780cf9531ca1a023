"""The unit of work that travels through all stages, and what a stage says of it afterwards.

Owns: the words of the engine-stage protocol as frozen values (``wire`` puts them on gRPC).
Invariant: every stage of an epoch is told the same microbatches in the same order, so neighbours never disagree about
what the next hidden state is. A row id is never reused within an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Protocol

from typing_extensions import Buffer

from mlx_cluster.request import Grammar, Pool, Sampling


class Kind(IntEnum):
    CONTROL = 0  # only rows and entries change: no forward pass, no hidden state, still reported
    PREFILL = 1  # one chunk of one row, on the row's own cache; or the first chunks of several fresh rows
    DECODE = 2  # one token for each row of one group
    VERIFY = 3  # the last token of each row of one group and a draft of those behind it


@dataclass(frozen=True, slots=True)
class RowSpec:
    """Sent once, with the first microbatch that names the row.

    ``history`` (prompt and already emitted ids) and ``prompt_length`` are filled only where penalties need them; where
    only a grammar does, ``history`` has just the emitted ids, and ``prompt_length`` is 0. ``first_index`` is the token
    index of the first token this row will draw. ``stop_token_ids`` come with a grammar: they may be drawn exactly where
    it may end. ``prompt_logprobs`` and ``pool`` are the request's, and such a row is alone in its prefill microbatches;
    the former comes with ``history`` and ``prompt_length``.
    """

    row: int
    sampling: Sampling
    choice: int
    first_index: int = 0
    prompt_length: int = 0
    history: tuple[int, ...] = ()
    grammar: Grammar | None = None
    stop_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    pool: Pool | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """What an entry on a disk is: ``digest`` names the file, ``salt`` and ``tokens`` are what it was made of."""

    digest: bytes
    salt: str = ""
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Store:
    """Keep a copy of the row's caches, as they are before this microbatch's forward pass, as ``entry``.

    ``saved`` is there where entries go to the disk too.
    """

    row: int
    entry: int
    saved: Saved | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The row, admitted in the same header, begins with a copy of the entry's first ``length`` positions.

    With a ``digest`` the entry is to be read from the disk first.
    """

    row: int
    entry: int
    length: int
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Trim:
    """The row has ``length`` positions: what was computed behind them was a draft that proved wrong."""

    row: int
    length: int


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A header. Before the forward pass the stage does, in this order: trim, store, release, evict, admit, load.

    So a store listed with the microbatch behind a prompt's last chunk keeps exactly the prompt, and one beside the
    release of its row what that row had. ``evict`` names entries to forget; an entry id is never reused in an epoch.

    PREFILL: with one row ``tokens`` is its chunk, and the row's own cache grows by ``len(tokens)``. With several
    ``tokens`` holds their chunks one after the other, unpadded, and ``lengths`` how many tokens each has; the hidden
    state is as wide as the longest, with anything behind a shorter row's end. Rows that begin here run as one batch
    where the slice can; those that have positions already (another chunk, a loaded entry) run one after the other.
    DECODE: ``rows`` lists *all* rows of ``group`` in batch order, ``tokens`` the last token of each. A row that was
    elsewhere (its prefill cache, another group) joins; a row that is no longer listed leaves and is kept aside until
    it is listed again or released.
    VERIFY: as DECODE, but the rows' tokens are the last one and behind it a draft of the next (``lengths`` where rows
    have different numbers of them). The last stage draws a token behind each, with the key of its index, and reports
    those up to and including the first that differs from the draft. The rows run one after the other, each on its own
    caches, which must be of a kind that can be cut: the next header that concerns the row trims what was rejected.
    ``sample`` says whether the last stage draws a token for each row (not for chunks before a prompt's last).
    """

    id: int
    kind: Kind
    rows: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    group: int = 0
    sample: bool = False
    admit: tuple[RowSpec, ...] = ()
    release: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    store: tuple[Store, ...] = ()
    load: tuple[Load, ...] = ()
    evict: tuple[int, ...] = ()
    trim: tuple[Trim, ...] = ()

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """How many of ``tokens`` each row has."""
        if self.lengths or not self.rows:
            return self.lengths
        return (len(self.tokens) // len(self.rows),) * len(self.rows)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(rows, positions) of the token array, padded to the longest row."""
        return (len(self.rows), max(self.row_lengths, default=0))

    def row_tokens(self) -> list[tuple[int, ...]]:
        """The tokens of each row."""
        ends = list(accumulate(self.row_lengths))
        return [self.tokens[end - length : end] for end, length in zip(ends, self.row_lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that the last stage drew for a row."""

    row: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """What the last stage says of a token of a row's own prompt, at this position."""

    row: int
    position: int
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PooledRow:
    row: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FailedRow:
    row: int
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """One per microbatch and stage. ``sampled`` comes from the last stage only; several of one row are in order.

    ``compute_seconds`` is done − max(dispatched, previous done); ``wait_seconds`` is how long header or hidden state
    kept the stage waiting before it; ``sent_bytes`` what it handed to its link. ``missing`` names rows whose ``Load``
    this stage could not do (no such entry, or none that can be cut to the length). Such a row is not failed: the stage
    passes on zeros for it, and draws nothing, until it is released; the engine runs its prompt again in another row.
    """

    microbatch_id: int
    stage: int
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    sent_bytes: int = 0
    sampled: tuple[Sampled, ...] = ()
    failed: tuple[FailedRow, ...] = ()
    missing: tuple[int, ...] = ()
    scored: tuple[ScoredToken, ...] = ()
    pooled: tuple[PooledRow, ...] = ()
    saved_bytes: int = 0  # what compression took off the bytes sent


@dataclass(frozen=True, slots=True)
class Held:
    """What a stage holds now: rows, and entries of the prefix cache in memory. An idle one holds no row."""

    rows: int
    entries: int


# -- hidden states and what executes them ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype (mlx's name: ``float32``, ``bfloat16`` …) of one tensor inside a frame.

    ``encoding`` names the compressed form that its bytes have (``transport.compression``); empty: as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    encoding: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """The hidden state of one microbatch: tensors laid end to end in ``payload``, described by ``tensors``.

    ``payload`` is anything with the buffer protocol, one-dimensional bytes; it is not copied when a link can help it.
    """

    microbatch_id: int
    tensors: tuple[TensorSpec, ...]
    payload: Buffer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one microbatch gave on one stage: a frame for the next stage, or tokens on the last one."""

    frame: Frame | None = None
    sampled: tuple[Sampled, ...] = ()
    failed: tuple[FailedRow, ...] = ()
    missing: tuple[int, ...] = ()
    scored: tuple[ScoredToken, ...] = ()
    pooled: tuple[PooledRow, ...] = ()


class Pending(Protocol):
    """A microbatch that was dispatched to the device."""

    def wait(self) -> Outcome:
        """Block until it is computed. Any thread may call it, once; it only reads evaluated arrays."""
        ...


class Runner(Protocol):
    """Executes microbatches for one slice of layers; all calls come from the one thread that owns mlx."""

    def submit(self, header: Microbatch, frame: Frame | None) -> Pending:
        """Build and dispatch one microbatch without waiting for it. ``frame`` is None on stage 0 and for CONTROL.

        Never raises for one row's trouble: a stage that cannot execute a row still returns the promised shape (zeros)
        and names the row in ``Outcome.failed``.
        """
        ...
