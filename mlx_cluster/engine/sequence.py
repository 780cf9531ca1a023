"""The values the scheduler works on: its policy, what it tells the engine, and the state of sequences and groups.

Owns: nothing but these shapes. Does not own: any decision (``engine.scheduler``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mlx_cluster.engine.chunking import MIN_CHUNK, ChunkTimes
from mlx_cluster.engine.memory import StageMemory
from mlx_cluster.engine.waiting import Share
from mlx_cluster.errors import ClusterError
from mlx_cluster.microbatch import Microbatch, RowSpec
from mlx_cluster.request import FinishReason, SequenceRequest, Token


def _unmeasured(_rows: int) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds of one pipeline's scheduler.

    ``num_groups`` answers how many groups to run for a number of decoding rows (see ``engine.fill``).
    ``step_seconds`` predicts a decode step of so many rows, None until measured; ``chunk_times`` prefill chunks.
    ``max_prompts`` is how many short prompts may share a microbatch; ``itl_budget_seconds`` what the time between two
    tokens of a stream may come to while a prompt is computed. ``shares`` and ``ageing_seconds`` are about who waits
    (see ``engine.waiting``). A lone short prompt is held back for ``max_wait_seconds``, so that others may share its
    microbatch. ``memory`` is what each stage has for rows; where it forces rows apart there are up to ``max_groups``
    groups (default: two per stage).
    """

    num_stages: int
    max_rows: int
    max_queue: int
    prefill_chunk: int
    num_groups: Callable[[int], int]
    max_prompts: int = 1
    shares: Mapping[str, Share] = field(default_factory=dict)
    ageing_seconds: float = 15.0
    step_seconds: Callable[[int], float | None] = _unmeasured
    chunk_times: ChunkTimes | None = None
    itl_budget_seconds: float = 0.2
    min_chunk: int = MIN_CHUNK
    max_wait_seconds: float = 0.0
    max_groups: int | None = None
    memory: tuple[StageMemory, ...] = ()


# -- what the scheduler tells the engine ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The sequence got its row; ``cached_tokens`` of its prompt are there already, as far as is known now."""

    sequence: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Drew:
    sequence: int
    token: Token


@dataclass(frozen=True, slots=True)
class Ended:
    sequence: int
    reason: FinishReason
    completion_tokens: int
    cached_tokens: int = 0
    pooled: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """Log probabilities of the prompt's own tokens."""

    sequence: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    sequence: int
    error: ClusterError


Effect = Started | Read | Drew | Ended | Failed


# -- state ---------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class SequenceState:
    id: int
    request: SequenceRequest
    tokens: tuple[int, ...]  # what prefill must compute: prompt and already emitted ids
    row: int = -1
    arrived_at: float = 0.0
    prefilled: int = 0
    emitted: list[int] = field(default_factory=list)  # new ones; those of the request are part of ``tokens``
    entry: int | None = None  # the prefix entry that it started from
    cached: int = 0  # how many tokens that saved
    may_reuse: bool = True
    started: bool = False  # it had a row before, and was preempted
    num_read: int = 1  # positions of the prompt whose log probability was told, the first of which has none
    kept: list[int] = field(default_factory=list)  # entries made of its row
    group: Group | None = None

    @property
    def num_emitted(self) -> int:
        return len(self.request.emitted) + len(self.emitted)

    @property
    def num_positions(self) -> int:
        """How many of its tokens are computed between two steps: all but the last, which was only drawn."""
        return len(self.tokens) + len(self.emitted) - 1

    def preempt(self) -> None:
        """Back to the state of one that resumes: what it emitted is computed again, and the next token is the same."""
        self.request = replace(self.request, emitted=(*self.request.emitted, *self.emitted))
        self.tokens = self.request.prompt + self.request.emitted
        self.emitted = []
        self.row = -1
        self.prefilled = self.cached = 0
        self.entry = None
        self.kept = []


@dataclass(slots=True, eq=False)
class Group:
    id: int
    members: list[SequenceState] = field(default_factory=list)
    in_flight: bool = False


@dataclass(frozen=True, slots=True)
class InFlight:
    """``chunks`` are the (position, length) of a prefill's rows; several prompts have the length of the longest."""

    microbatch: Microbatch
    sequences: tuple[SequenceState, ...]
    group: Group | None
    chunks: tuple[tuple[int, int], ...] = ()


def row_spec(sequence: SequenceState) -> RowSpec:
    """What the stages must know of a row, sent with its first chunk."""
    request = sequence.request
    needs_prompt = request.sampling.needs_history or request.prompt_logprobs is not None
    history = sequence.tokens if needs_prompt else request.emitted if request.grammar else ()
    return RowSpec(
        row=sequence.row,
        sampling=request.sampling,
        choice=request.choice,
        first_index=len(request.emitted),
        prompt_length=len(request.prompt) if needs_prompt else 0,
        history=history,
        grammar=request.grammar,
        stop_token_ids=tuple(sorted(request.stop_token_ids)) if request.grammar else (),
        prompt_logprobs=request.prompt_logprobs,
        pool=request.pool,
    )
