"""A pipeline under a virtual clock: given stage times, it carries out what a scheduler says (tests of pure parts)."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_cluster.engine.scheduler import Scheduler
from mlx_cluster.engine.sequence import Effect
from mlx_cluster.microbatch import Kind, Microbatch, Report, Sampled
from mlx_cluster.request import SequenceRequest

StageTime = Callable[[Microbatch], float]
Chunks = tuple[tuple[int, int], ...]


def scripted_token(row: int, index: int) -> int:
    return 1000 + (row * 31 + index * 7) % 500


@dataclass
class SimulatedPipeline:
    """Stages work first in, first out; a report arrives the moment a stage is done (plus ``hop`` between stages)."""

    scheduler: Scheduler
    stage_times: list[StageTime]
    hop: float = 0.0
    now: float = 0.0
    busy: list[float] = field(default_factory=list)
    sent: list[tuple[float, Microbatch]] = field(default_factory=list)
    effects: list[tuple[float, Effect]] = field(default_factory=list)
    known_rows: set[int] = field(default_factory=set)
    on_stage_report: Callable[[int, Microbatch, float], None] | None = None
    measure: Callable[[int, Microbatch, Chunks, float], None] | None = None  # told when a microbatch is done
    check: bool = True
    script: Callable[[int, int], int] = scripted_token  # (row, index) → the token that it draws
    lose_load: Callable[[int], bool] = lambda _entry: False  # whether a stage turns out not to have an entry
    contents: dict[int, list[int]] = field(default_factory=dict)  # row → the tokens in its caches
    drafts: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of rows whose block is not settled
    entries: dict[int, tuple[int, ...]] = field(default_factory=dict)
    num_loads: int = 0

    def __post_init__(self) -> None:
        self.busy = [0.0] * len(self.stage_times)
        self._free_at = [0.0] * len(self.stage_times)
        self._done: list[tuple[float, int, Microbatch]] = []
        self._drawn: dict[int, int] = {}
        self._missing: set[int] = set()
        self._chunks: dict[int, Chunks] = {}

    def submit(self, request: SequenceRequest) -> int:
        sequence = self.scheduler.submit(request)
        self.pump()
        return sequence

    def cancel(self, sequence: int) -> None:
        self.scheduler.cancel(sequence)
        self.pump()

    def pump(self) -> None:
        while (microbatch := self.scheduler.next(self.now)) is not None:
            self._send(microbatch)
        self._record(self.scheduler.take_effects())
        if self.check:
            self.scheduler.audit()

    def step(self) -> bool:
        """Carry out the next completion; False when nothing is in flight."""
        if not self._done:
            return False
        self.now, _, microbatch = heapq.heappop(self._done)
        chunks = self._chunks.pop(microbatch.id)
        if self.measure is not None and microbatch.kind is not Kind.CONTROL:
            for stage, stage_time in enumerate(self.stage_times):
                self.measure(stage, microbatch, chunks, stage_time(microbatch))
        sampled = []
        if microbatch.sample:
            for row, tokens in zip(microbatch.rows, microbatch.row_tokens(), strict=True):
                draft = tokens[1:] if microbatch.kind is Kind.VERIFY else ()
                sampled += self._draw(row, draft)
        missing = tuple(row for row in microbatch.rows if row in self._missing)
        report = Report(microbatch.id, len(self.stage_times) - 1, sampled=tuple(sampled), missing=missing)
        self.scheduler.restart_rows(missing)
        self._record(self.scheduler.complete(report))
        self.pump()
        return True

    def _draw(self, row: int, draft: tuple[int, ...]) -> list[Sampled]:
        """The row's next token, and those behind it as far as the draft has them."""
        drawn: list[Sampled] = []
        for guess in (*draft, None):
            index = self._drawn.get(row, 0)
            self._drawn[row] = index + 1
            drawn.append(Sampled(row, self.script(row, index)))
            if drawn[-1].token_id != guess:
                break
        return drawn

    def run(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def _send(self, microbatch: Microbatch) -> None:
        self.sent.append((self.now, microbatch))
        self._chunks[microbatch.id] = self.scheduler.chunks(microbatch.id)
        if self.check:
            self._check_rows(microbatch)
        at = self.now
        for stage, stage_time in enumerate(self.stage_times):
            seconds = stage_time(microbatch) if microbatch.kind is not Kind.CONTROL else 0.0
            begin = max(at, self._free_at[stage])
            at = self._free_at[stage] = begin + seconds
            self.busy[stage] += seconds
            if self.on_stage_report is not None:
                self.on_stage_report(stage, microbatch, seconds)
            if stage < len(self.stage_times) - 1:
                at += self.hop
        heapq.heappush(self._done, (at, microbatch.id, microbatch))

    def _check_rows(self, microbatch: Microbatch) -> None:
        """Do what every stage does with the header, and check that it makes sense."""
        for trim in microbatch.trim:
            assert 0 < len(self.contents[trim.row]) - trim.length < len(self.drafts[trim.row]) + 1, "not a draft"
            del self.contents[trim.row][trim.length :]
        for row in (*microbatch.rows, *(store.row for store in microbatch.store)):
            self.drafts.pop(row, None)
        for store in microbatch.store:
            self.entries[store.entry] = tuple(self.contents[store.row])
        for row in microbatch.release:
            assert row in self.known_rows, f"row {row} is released and was not there"
            self.known_rows.discard(row)
            self.contents.pop(row)
        for entry in microbatch.evict:
            self.entries.pop(entry, None)  # a broken row never became one
        for spec in microbatch.admit:
            assert spec.row not in self.known_rows, f"row {spec.row} is admitted twice"
            self.known_rows.add(spec.row)
            self.contents[spec.row] = []
        for load in microbatch.load:
            self.num_loads += 1
            assert not self.contents[load.row], "only a fresh row loads"
            self.contents[load.row] = list(self.entries[load.entry][: load.length])
            if self.lose_load(load.entry):
                self._missing.add(load.row)
        assert set(microbatch.rows) <= self.known_rows, "a row works that no stage knows"
        assert len(set(microbatch.rows)) == len(microbatch.rows), "a row is twice in a batch"
        for row, tokens in zip(microbatch.rows, microbatch.row_tokens(), strict=True):
            assert not microbatch.lengths or not self.contents[row], "several prompts together are fresh"
            self.contents[row] += tokens
            if microbatch.kind is Kind.VERIFY:
                self.drafts[row] = tokens[1:]
                assert tuple(self.contents[row][: -len(tokens) + 1]) == self.scheduler.tokens_of(row)
            elif microbatch.sample and row not in self._missing:
                assert tuple(self.contents[row]) == self.scheduler.tokens_of(row), "the caches hold something else"

    def _record(self, effects: list[Effect]) -> None:
        self.effects += [(self.now, effect) for effect in effects]
