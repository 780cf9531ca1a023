"""``SliceRunner``: executes microbatches on one slice of layers.

Owns: the forward pass of a microbatch: which rows run together, what becomes of their output, who failed.
Does not own: where rows and entries are kept (``model.rows``), the order and timing of microbatches (the stage's loop),
or what they mean to a request (the engine).
Invariant: every call comes from the one thread that owns mlx; only ``Pending.wait`` may run elsewhere, and it only
reads arrays that were handed to ``async_eval``. One row's trouble leaves every other row's tokens as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_cluster import log
from mlx_cluster.errors import LinkMismatch, RowFailed
from mlx_cluster.microbatch import FailedRow, Frame, Held, Kind, Microbatch, Outcome, Pending, RowSpec, Saved
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import prompts, reading, sampling, state
from mlx_cluster.model.grammar import Grammars, RowGrammar
from mlx_cluster.model.load import Dequantize, Device, LoadedSlice, Progress, floating_dtype, load_slice
from mlx_cluster.model.pending import Finished, Incomplete, PendingBlocks, PendingFill, PendingFrame, PendingTokens
from mlx_cluster.model.prefix_disk import PrefixDisk
from mlx_cluster.model.quantized_cache import KvFormat
from mlx_cluster.model.rows import COMPUTE_ERRORS, Row, Rows
from mlx_cluster.model.slice import Head
from mlx_cluster.request import Sampling

async_eval: Any = mx.async_eval  # its types cover neither trees nor keyword-less calls

# mlx keeps freed buffers for reuse; shapes change with every prompt, so they are given back now and then.
_CLEAR_CACHE_EVERY = 256
# Rows and group of the warm-up; the engine counts from 0.
_WARM_UP_ROWS = (-1, -2)
_WARM_UP_GROUP = -1

logger = log.get("model.runner")


class SliceRunner:
    """Implements ``microbatch.Runner`` with a loaded slice."""

    def __init__(self, loaded: LoadedSlice, model_dir: Path) -> None:
        self.slice = loaded.slice
        self.device = loaded.device
        self.slice_bytes = loaded.num_bytes
        self._submitted = 0
        self._grammars = Grammars(model_dir, self.slice.vocab_size) if self.slice.last else None
        self._rows = Rows(self.slice, self._grammars)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        start: int,
        end: int,
        *,
        device: Device = "auto",
        dequantize: Dequantize = "auto",
        memory_budget_bytes: int | None = None,
        kv: KvFormat | None = None,
        known: dict[str, mx.array] | None = None,
        on_progress: Progress | None = None,
    ) -> SliceRunner:
        """Load layers ``[start, end)`` on the calling thread, which every later call must come from.

        ``known`` are weights of another slice of the same checkpoint, from its ``retire``.

        Raises ``CheckpointError``, ``UnsupportedModel``, ``PlanError``.
        """
        loaded = load_slice(
            model_dir,
            start,
            end,
            device=device,
            dequantize=dequantize,
            memory_budget_bytes=memory_budget_bytes,
            kv=kv,
            known=known,
            on_progress=on_progress,
        )
        return cls(loaded, model_dir)

    @property
    def memory_bytes(self) -> int:
        """What mlx holds now: weights, caches and work in flight."""
        return int(mx.get_active_memory())

    @property
    def cache_bytes(self) -> int:
        """What the caches of all rows take."""
        return self._rows.num_bytes

    @property
    def prefix_bytes(self) -> int:
        """What the entries of the prefix cache take."""
        return self._rows.entries.num_bytes

    def keep_on_disk(self, root: Path, max_bytes: int, model: str) -> list[Saved]:
        """From now on entries go to the disk too; what lies there already. ``model`` names the checkpoint."""
        if self._rows.entries.disk is not None:
            return self._rows.entries.disk.entries()
        part = self.slice
        kinds = [type(cache).__name__ for cache in row_cache.parts(part.make_caches())]
        fingerprint = f"{model}/{part.start}-{part.end}/{floating_dtype(part)}/{self.row_cost}/{part.kv}/{kinds}"
        disk = self._rows.entries.disk = PrefixDisk(root, max_bytes, fingerprint)
        return disk.entries()

    def drop(self) -> None:
        """Forget all rows, groups and entries. Returns when the device has done everything that it was given."""
        mx.synchronize()
        self._rows.clear()
        mx.clear_cache()

    def retire(self) -> dict[str, mx.array]:
        """The slice's weights by name, for another slice; this one is of no use any more."""
        self.drop()
        if self._rows.entries.disk is not None:
            self._rows.entries.disk.close()
        return self.slice.parameters_read()

    @cached_property
    def can_trim(self) -> bool:
        """Whether a row may begin with any part of an entry; else it must be the whole one."""
        return row_cache.always_cuts(self.slice.make_caches())

    @cached_property
    def row_cost(self) -> row_cache.Cost:
        """What the caches of one row take here, a row with others in its group not counted."""
        caches = self.slice.make_caches()
        self.slice(mx.zeros((1, 2), mx.int32), self.slice.stand_ins(1, 2), caches, head="none")
        return row_cache.cost(caches)

    @property
    def kv_bytes_per_position(self) -> int:
        return self.row_cost.bytes_per_position

    @property
    def kv_fixed_bytes(self) -> int:
        return self.row_cost.fixed_bytes

    @cached_property
    def _shares_prompts(self) -> bool:
        return prompts.is_exact(self.slice)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def held(self) -> Held:
        """Any thread may ask."""
        return Held(len(self._rows), len(self._rows.entries))

    def warm_up(self) -> None:
        """Run a prompt and a batched step once: some operations are compiled at first use, which takes seconds."""
        rows = _WARM_UP_ROWS
        if self._grammars is not None:
            self._grammars.warm_up()
        samplings = (
            Sampling(temperature=0.0, top_logprobs=1),
            Sampling(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1),
        )
        for row, parameters in zip(rows, samplings, strict=True):
            spec = RowSpec(row, parameters, choice=0)
            chunk = Microbatch(0, Kind.PREFILL, rows=(row,), tokens=(0, 0), sample=True, admit=(spec,))
            self.submit(chunk, self._blank_frame(chunk)).wait()
        for _ in range(2):
            step = Microbatch(0, Kind.DECODE, rows=rows, tokens=(0, 0), group=_WARM_UP_GROUP, sample=True)
            self.submit(step, self._blank_frame(step)).wait()
        self.submit(Microbatch(0, Kind.CONTROL, release=rows), None).wait()
        shares = self._shares_prompts  # tried now: it runs, and so compiles, what several prompts at once need
        logger.debug("the slice is warm", shares_prompts=shares, can_trim=self.can_trim, row_cost=self.row_cost)
        mx.clear_cache()

    # -- microbatches --------------------------------------------------------------------------------

    def submit(self, header: Microbatch, frame: Frame | None) -> Pending:
        """Build and dispatch one microbatch. See ``microbatch.Runner``.

        Raises ``LinkMismatch`` when the header contradicts itself, or the frame is not the one that it promises.
        """
        if len(header.row_lengths) != len(header.rows) or sum(header.row_lengths) != len(header.tokens):
            raise LinkMismatch(
                f"microbatch {header.id} has {len(header.rows)} rows of {header.row_lengths} tokens, "
                f"but {len(header.tokens)} tokens"
            )
        missing = self._rows.change(header)
        pending = self._execute(header, frame)
        return Incomplete(pending, missing) if missing else pending

    def _execute(self, header: Microbatch, frame: Frame | None) -> Pending:
        if header.kind is Kind.CONTROL or not header.rows:
            return Finished(Outcome())
        received = self._received(header, frame)
        self._submitted += 1
        if self._submitted % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        tokens = header.row_tokens()
        present = [index for index, row in enumerate(header.rows) if not self._rows.is_missing(row)]
        problems = {
            header.rows[index]: self._rows.problem(header, header.rows[index], tokens[index]) for index in present
        }
        failed = {row: problem for row, problem in problems.items() if problem is not None}
        good = [index for index in present if header.rows[index] not in failed]
        try:
            return self._dispatch(header, tokens, received, good, failed)
        except COMPUTE_ERRORS as error:
            # The forward pass of these rows broke off half-way, so their caches are of no use any more.
            message = f"layers [{self.slice.start}, {self.slice.end}) cannot run this row: {error}"
            for row in problems:
                self._rows.spoil(row, message)
            failed |= {row: message for row in problems if row not in failed}
            return Finished(self._nothing(header, failed))

    def _dispatch(
        self,
        header: Microbatch,
        tokens: Sequence[tuple[int, ...]],
        received: list[mx.array],
        good: list[int],
        failed: dict[int, str],
    ) -> Pending:
        if not good:
            return Finished(self._nothing(header, failed))
        parts = self._prefill_parts(header, good) if header.kind is Kind.PREFILL else self._decode_parts(header, good)
        head: Head = "none" if not header.sample else "all" if header.kind is Kind.VERIFY else "last"
        read = self._read(header, good)
        hidden = False
        if read is not None:
            head, hidden = reading.head_for(read.spec, head)
        outputs: list[list[mx.array]] = []
        cached: list[Any] = []
        order: list[int] = []  # rows of the outputs, as indices into the header's
        for part in parts:
            at = [good[index] for index in part.rows]
            mine = prompts.pad([tokens[index] for index in at])
            lengths = part.lengths and [len(tokens[index]) for index in at]
            states = received if len(at) == len(header.rows) else [array[mx.array(at)] for array in received]
            states = self.slice.fit_received(states, mine.shape[1])
            row_cache.grow(part.caches, mine.shape[1])
            output = self.slice(mine, states, part.caches, head=head, lengths=lengths, hidden=hidden)
            outputs.append(output if self.slice.last else self.slice.fit_output(output, header.batch_shape[1]))
            cached += self._settle([header.rows[index] for index in at], part)
            order += at
        for index in good:
            self._rows[header.rows[index]].positions += len(tokens[index])
        failures = tuple(FailedRow(row, message) for row, message in failed.items())
        if self.slice.last and header.kind is Kind.VERIFY:
            lines = _concatenate([logits.reshape(-1, logits.shape[-1]) for (logits,) in outputs])
            blocks = {header.rows[index]: tokens[index] for index in order}
            return self._verify(lines, blocks, cached, failures)
        output = [_concatenate(leaf) for leaf in zip(*outputs, strict=True)]
        if read is not None and hidden:
            return self._pool(header, read, output, cached, failures)
        if self.slice.last:
            pending = self._answer(header, output, order, cached, failures)
            return pending if read is None else self._score(read, output[0][0], pending)
        frame = state.pack(header.id, [_spread(array, order, len(header.rows)) for array in output])
        async_eval(frame.payload, cached)
        return PendingFrame(frame, header.rows, failures)

    def _settle(self, rows: Sequence[int], part: row_cache.Part) -> list[Any]:
        """Behind a part's forward pass: prompts that shared it go apart. Gives what must be evaluated with it."""
        if not part.lengths:
            return row_cache.states(part.caches)
        each = prompts.end(part.caches, part.lengths)
        for row, caches in zip(rows, each, strict=True):
            self._rows[row].caches = caches
        return [row_cache.states(caches) for caches in each]

    def _answer(
        self,
        header: Microbatch,
        output: list[mx.array],
        good: list[int],
        cached: Sequence[Any],
        failures: tuple[FailedRow, ...],
    ) -> Pending:
        """On the last slice: draw tokens, or only fill the caches."""
        rows = [header.rows[index] for index in good]
        if not header.sample:
            arrays = [array for _, array in tree_flatten(cached) if isinstance(array, mx.array)]
            # The caches' own arrays change under a waiting thread with the next chunk; this one does not.
            filled = mx.depends(mx.zeros((1,), mx.uint8), arrays)
            async_eval(filled, cached)
            return PendingFill(filled, header.rows, failures)
        logits = output[0][:, -1]
        limits: sampling.Limits | None = None
        if any(self._rows[row].grammar is not None for row in rows):
            async_eval(logits, cached)  # the masks are computed while the device runs the forward pass
            masks, refused = self._masks(header, rows)
            limits = sampling.limits(masks, logits.shape[-1]) if masks else None
            failures += refused
        drawn = sampling.sample(logits, [self._rows[row].draw() for row in rows], limits)
        async_eval(drawn.arrays(), cached)
        wanted = [self._rows[row].spec.sampling.top_logprobs for row in rows]
        return PendingTokens(drawn, rows, wanted, failures)

    def _read(self, header: Microbatch, good: list[int]) -> Row | None:
        """The row of this microbatch whose own positions are read, on the last slice; such a row comes alone."""
        if not self.slice.last or header.kind is not Kind.PREFILL or len(good) != 1:
            return None
        row = self._rows[header.rows[good[0]]]
        return row if row.spec.prompt_logprobs is not None or row.spec.pool is not None else None

    def _score(self, row: Row, logits: mx.array, pending: Pending) -> Pending:
        """The log probabilities of the prompt's tokens behind this chunk's positions, beside what else it gives."""
        start = row.positions - logits.shape[0]
        tokens = reading.targets(row.spec, start, logits.shape[0])
        if not tokens:
            return pending
        scores = reading.score(logits, tokens)
        async_eval(scores.arrays())
        return reading.PendingScores(pending, row.spec.row, start + 1, tokens, scores, row.spec.prompt_logprobs or 0)

    def _pool(
        self,
        header: Microbatch,
        row: Row,
        output: list[mx.array],
        cached: Sequence[Any],
        failures: tuple[FailedRow, ...],
    ) -> Pending:
        if row.spec.pool == "mean":
            total = output[0][0].astype(mx.float32).sum(axis=0)
            row.total = total if row.total is None else row.total + total
            async_eval(row.total, cached)
        if not header.sample:
            return self._answer(header, output, [], cached, failures)
        vector = reading.unit_vector(row.total if row.spec.pool == "mean" else output[0][0, -1].astype(mx.float32))
        async_eval(vector, cached)
        return reading.PendingPool(vector, row.spec.row, failures)

    def _verify(
        self,
        lines: mx.array,
        blocks: Mapping[int, tuple[int, ...]],
        cached: Sequence[Any],
        failures: tuple[FailedRow, ...],
    ) -> Pending:
        """On the last slice: draw a token behind each of each row's; ``lines`` are the logits of all, row by row.

        Each draw is what it would be without a draft: its key is that of its index, and grammar and history stand where
        the tokens before it put them.
        """
        if any(self._rows[row].grammar is not None for row in blocks):
            async_eval(lines, cached)
        rows: list[int] = []
        draws: list[sampling.Draw] = []
        masks: dict[int, Any] = {}
        usable: dict[int, int] = {}
        for row, block in blocks.items():
            known = self._rows[row]
            usable[row] = len(block)
            if known.grammar is not None:
                try:
                    known.grammar.consume(block[0])
                    mine = known.grammar.masks(block[1:])
                except RowFailed as error:
                    known.problem = str(error)
                    failures += (FailedRow(row, str(error)),)
                    mine = []
                masks |= {len(rows) + at: mask for at, mask in enumerate(mine)}
                usable[row] = len(mine)
            rows += [row] * len(block)
            draws += known.draws(block[1:])
        limits = sampling.limits(masks, lines.shape[-1]) if masks else None
        drawn = sampling.sample(lines, draws, limits)
        async_eval(drawn.arrays(), cached)
        wanted = [draw.sampling.top_logprobs for draw in draws]
        tokens = PendingTokens(drawn, rows, wanted, failures)
        return PendingBlocks(tokens, {row: block[1:] for row, block in blocks.items()}, usable)

    def _masks(self, header: Microbatch, rows: Sequence[int]) -> tuple[dict[int, Any], tuple[FailedRow, ...]]:
        """Masks by index in ``rows``, and the rows whose grammar cannot go on. A decode step's token is consumed."""
        asking: dict[int, RowGrammar] = {}
        found: dict[int, Any] = {}
        for index, row in enumerate(rows):
            grammar = self._rows[row].grammar
            if grammar is None:
                continue
            try:
                if header.kind is Kind.DECODE:
                    grammar.consume(header.tokens[header.rows.index(row)])
                asking[index] = grammar
            except RowFailed as error:
                found[index] = error
        if asking:
            assert self._grammars is not None
            found.update(zip(asking, self._grammars.masks(list(asking.values())), strict=True))
        refused: list[FailedRow] = []
        for index, mask in sorted(found.items()):
            if isinstance(mask, RowFailed):
                self._rows[rows[index]].problem = str(mask)
                refused.append(FailedRow(rows[index], str(mask)))
        return {index: mask for index, mask in found.items() if not isinstance(mask, RowFailed)}, tuple(refused)

    def _prefill_parts(self, header: Microbatch, good: list[int]) -> list[row_cache.Part]:
        """Prompts that begin here together, where the slice can; any other row by itself."""
        fresh = [at for at, index in enumerate(good) if self._rows[header.rows[index]].is_fresh]
        if len(fresh) < 2 or not self._shares_prompts:
            fresh = []
        lengths = [header.row_lengths[good[at]] for at in fresh]
        shared = [row_cache.Part(fresh, prompts.begin(self.slice, lengths), lengths)] if fresh else []
        alone = [at for at in range(len(good)) if at not in fresh]
        return shared + [row_cache.Part((at,), self._rows.own_caches(header.rows[good[at]])) for at in alone]

    def _decode_parts(self, header: Microbatch, good: list[int]) -> list[row_cache.Part]:
        apart = header.kind is Kind.VERIFY
        parts = self._rows.arrange(header.group, [header.rows[index] for index in good], apart=apart)
        tokens = header.row_tokens()
        for index in good:
            row = self._rows[header.rows[index]]
            row.remember(tokens[index][0])
            row.draft = tokens[index][1:]
        return parts

    # -- frames --------------------------------------------------------------------------------------

    def _received(self, header: Microbatch, frame: Frame | None) -> list[mx.array]:
        if self.slice.first:
            return []
        if frame is None or frame.microbatch_id != header.id:
            what = "no frame" if frame is None else f"the frame of microbatch {frame.microbatch_id}"
            raise LinkMismatch(f"microbatch {header.id} came with {what}: the stages have lost step")
        arrays = state.unpack(frame)
        shape = header.batch_shape
        if not arrays or tuple(arrays[0].shape[:2]) != shape:
            got = [tuple(array.shape) for array in arrays]
            raise LinkMismatch(f"microbatch {header.id} has {shape} tokens, its hidden state has the shapes {got}")
        return arrays

    def _nothing(self, header: Microbatch, failed: dict[int, str]) -> Outcome:
        """The promised shape, for a microbatch of which no row could run."""
        failures = tuple(FailedRow(row, message) for row, message in failed.items())
        if self.slice.last:
            return Outcome(failed=failures)
        return Outcome(state.zero_frame(header.id, self.slice.output_specs(*header.batch_shape)), failed=failures)

    def _blank_frame(self, header: Microbatch) -> Frame | None:
        if self.slice.first:
            return None
        specs = [state.spec_of(array) for array in self.slice.stand_ins(*header.batch_shape)]
        return state.zero_frame(header.id, specs)


def _concatenate(arrays: Sequence[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=0)


def _spread(array: mx.array, good: Sequence[int], num_rows: int) -> mx.array:
    """Rows at their places among ``num_rows``, zeros where a row failed."""
    if list(good) == list(range(num_rows)):
        return array
    full = mx.zeros((num_rows, *array.shape[1:]), array.dtype)
    full[mx.array(list(good))] = array
    return full
