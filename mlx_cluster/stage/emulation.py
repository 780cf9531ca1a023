"""A runner that sleeps instead of computing: stands in for an accelerator-bound machine.

Owns: the virtual device's clock, frames of the right size and the scripted tokens of the last stage.
Does not own: the loop around it, which is the real one. mlx is never imported here.
Invariant: the virtual device does one microbatch at a time, in order; its time passes while Python does other things.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_cluster.microbatch import Frame, Held, Kind, Microbatch, Outcome, RowSpec, Sampled, TensorSpec
from mlx_cluster.stage.spec import EmulationSpec


def step_seconds(spec: EmulationSpec, header: Microbatch, positions: Sequence[int] = ()) -> float:
    """How long the virtual device computes this microbatch; ``positions`` are those its rows have already."""
    match header.kind:
        case Kind.CONTROL:
            return 0.0
        case Kind.PREFILL:
            squares = sum(n * (n + 2 * p) for n, p in zip(header.row_lengths, positions, strict=False))
            linear = spec.seconds_per_step + len(header.tokens) * spec.seconds_per_prompt_token
            return linear + squares * spec.seconds_per_prompt_square
        case Kind.DECODE:
            return _rows_seconds(spec, len(header.rows))
        case Kind.VERIFY:  # to the layers a position is a row
            return _rows_seconds(spec, len(header.tokens))


def _rows_seconds(spec: EmulationSpec, rows: int) -> float:
    steps = math.ceil(rows / spec.rows_per_step) if spec.rows_per_step else 1
    return steps * spec.seconds_per_step + rows * spec.seconds_per_row


def scripted_token(spec: EmulationSpec, seed: int, choice: int, index: int) -> int:
    """The token an emulated last stage "draws": keyed as a real draw, so a resumed request gets the same ones."""
    if spec.repeat_after:
        index %= spec.repeat_after
    return spec.first_token_id + (seed * 31 + choice * 17 + index * 7) % spec.num_token_ids


@dataclass(frozen=True, slots=True)
class _Dispatched:
    """See ``microbatch.Pending``."""

    outcome: Outcome
    done_at: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def wait(self) -> Outcome:
        if (rest := self.done_at - self.clock()) > 0:
            self.sleep(rest)
        return self.outcome


class EmulatedRunner:
    """See ``microbatch.Runner``."""

    def __init__(
        self,
        spec: EmulationSpec,
        *,
        last: bool,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spec, self._last = spec, last
        self._clock, self._sleep = clock, sleep
        self._device_free_at = 0.0
        self._rows: dict[int, RowSpec] = {}
        self._drawn: dict[int, int] = {}
        self._prefilled: dict[int, int] = {}
        self._entries: set[int] = set()
        self._payload = bytes(0)

    def held(self) -> Held:
        return Held(len(self._rows), len(self._entries))

    def submit(self, header: Microbatch, frame: Frame | None) -> _Dispatched:
        """Queue on the virtual device and return at once; only ``burn_python_seconds`` of it hold the caller."""
        self._entries |= {store.entry for store in header.store}
        self._entries -= set(header.evict)
        for row in header.release:
            self._rows.pop(row, None)
            self._drawn.pop(row, None)
            self._prefilled.pop(row, None)
        for spec in header.admit:
            self._rows[spec.row] = spec
        seconds = step_seconds(self._spec, header, self._positions(header))
        burnt = min(seconds, self._spec.burn_python_seconds)
        self._burn(burnt)
        self._device_free_at = max(self._clock(), self._device_free_at) + seconds - burnt
        return _Dispatched(self._outcome(header), self._device_free_at, self._clock, self._sleep)

    def _positions(self, header: Microbatch) -> list[int]:
        """Where the chunks of a prefill begin; counts them."""
        if header.kind is not Kind.PREFILL:
            return []
        for load in header.load:
            self._prefilled[load.row] = load.length
        begin = [self._prefilled.get(row, 0) for row in header.rows]
        for row, at, length in zip(header.rows, begin, header.row_lengths, strict=True):
            self._prefilled[row] = at + length
        return begin

    def _burn(self, seconds: float) -> None:
        end = self._clock() + seconds
        while self._clock() < end:
            pass

    def _outcome(self, header: Microbatch) -> Outcome:
        if header.kind is Kind.CONTROL:
            return Outcome()
        if not self._last:
            return Outcome(frame=self._frame(header))
        if header.kind is Kind.VERIFY:
            blocks = zip(header.rows, header.row_tokens(), strict=True)
            return Outcome(sampled=tuple(drawn for row, tokens in blocks for drawn in self._verify(row, tokens[1:])))
        return Outcome(sampled=tuple(self._draw(row) for row in header.rows) if header.sample else ())

    def _verify(self, row: int, draft: tuple[int, ...]) -> list[Sampled]:
        """Tokens up to and including the first that the draft does not have."""
        drawn = [self._draw(row)]
        for guess in draft:
            if drawn[-1].token_id != guess:
                break
            drawn.append(self._draw(row))
        return drawn

    def _draw(self, row: int) -> Sampled:
        spec = self._rows[row]
        drawn = self._drawn.get(row, 0)
        self._drawn[row] = drawn + 1
        token = scripted_token(self._spec, spec.sampling.seed, spec.choice, spec.first_index + drawn)
        return Sampled(row, token, logprob=None if spec.sampling.top_logprobs is None else 0.0)

    def _frame(self, header: Microbatch) -> Frame:
        rows, positions = header.batch_shape
        tensor = TensorSpec("bfloat16", (rows, positions, self._spec.hidden_size))
        num_bytes = 2 * rows * positions * self._spec.hidden_size
        if len(self._payload) < num_bytes:
            self._payload = bytes(num_bytes)
        return Frame(header.id, (tensor,), memoryview(self._payload)[:num_bytes])
