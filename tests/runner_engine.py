"""An engine over one runner of a whole model, for tests that need a real model behind a gateway, without processes.

Owns: the thread that mlx belongs to, one row per sequence, each decoded alone.
Does not own: scheduling; what it does with a request's grammar, history and stop tokens is what the scheduler does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from mlx_cluster.errors import RowFailed
from mlx_cluster.microbatch import Kind, Microbatch, Outcome, RowSpec
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Admitted, Event, Finished, FinishReason, SequenceRequest, Token


class RunnerEngine:
    """Implements ``request.Engine``. ``close`` it at the end."""

    def __init__(self, model_dir: Path, num_layers: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlx")
        self._runner = self._thread.submit(SliceRunner.load, model_dir, 0, num_layers, device="cpu").result()
        self._ids = count(1)
        self._rows = count()

    def close(self) -> None:
        self._thread.shutdown()

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        row = next(self._rows)
        emitted = list(request.emitted)
        spec = RowSpec(
            row,
            request.sampling,
            request.choice,
            first_index=len(emitted),
            history=tuple(emitted),
            grammar=request.grammar,
            stop_token_ids=tuple(sorted(request.stop_token_ids)),
        )
        tokens = (*request.prompt, *emitted)
        yield Admitted()
        try:
            step = await self._submit(Kind.PREFILL, row, tokens, admit=(spec,))
            reason: FinishReason = "length"
            while True:
                drawn = step.sampled[0]
                yield Token(len(emitted), drawn.token_id, drawn.logprob, drawn.top)
                emitted.append(drawn.token_id)
                if drawn.token_id in request.stop_token_ids:
                    reason = "stop"
                    break
                if len(emitted) >= request.max_tokens:
                    break
                step = await self._submit(Kind.DECODE, row, (drawn.token_id,))
            yield Finished(reason, len(request.prompt), len(emitted))
        finally:
            self._thread.submit(self._run, Microbatch(0, Kind.CONTROL, release=(row,)))

    async def _submit(self, kind: Kind, row: int, tokens: tuple[int, ...], **values: Any) -> Outcome:
        header = Microbatch(next(self._ids), kind, (row,), tokens, group=row, sample=True, **values)
        outcome = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, header)
        if outcome.failed:
            raise RowFailed(outcome.failed[0].message)
        return outcome

    def _run(self, header: Microbatch) -> Outcome:
        return self._runner.submit(header, None).wait()
