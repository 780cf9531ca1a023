"""A session: a gateway's record of one client request while an engine serves it.

Owns: the engine's streams (one per choice), their deadlines, what has been emitted, when a choice ends, the usage.
Does not own: HTTP and dialects (``answer``, ``openai``), validation (``prepare``).
Invariant: leaving the session closes every engine stream, whatever ended it; after ``admitted`` each choice gives its
text in order and then exactly one ``ChoiceEnd``, or the session raises a typed error. A lost engine is a pause: the
streams are opened again (``attempts``), and the clocks stand still until they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from mlx_cluster import log
from mlx_cluster.errors import ClusterError, DeadlineExceeded, Unavailable
from mlx_cluster.gateway.attempts import Broken, Patience, already_complete, attempts
from mlx_cluster.gateway.choice import Choice, Piece
from mlx_cluster.gateway.echo import Echoed, Echoes
from mlx_cluster.gateway.harmony import splitter_for
from mlx_cluster.gateway.idempotency import Key, numbered_ids
from mlx_cluster.gateway.mailbox import Mailbox
from mlx_cluster.gateway.parts import Marked, Part
from mlx_cluster.gateway.prepare import Prepared
from mlx_cluster.metrics import GatewayMetrics
from mlx_cluster.request import Admitted, Event, Finished, Scored, SequenceRequest, Token

_log = log.get("gateway")

# Events that may wait for a slow client; then the engine's stream is not read on.
QUEUE_EVENTS = 256
# How long closing the engine's streams may take before they are left to themselves.
CLOSE_SECONDS = 5.0
# A client that leaves its events unread for so long gives its rows to others until it reads on.
PREEMPT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text of one choice. ``completion_tokens`` is the count of all choices so far."""

    choice: int
    piece: Piece
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class PartDelta:
    """A part of one choice that is not text: reasoning, or of a tool call. See ``parts``."""

    choice: int
    part: Marked
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    choice: int
    reason: Literal["stop", "length", "tool_calls"]
    completion_tokens: int
    stop_string: str | None = None  # the client's stop string that was met


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing came for ``keepalive_seconds``: a stream should show that it is alive."""


# What the streams of the choices put into the session's queue.
Item = Event | Broken | ClusterError
SessionEvent = Echoed | Delta | PartDelta | ChoiceEnd | Waiting


@dataclass(frozen=True, slots=True)
class Limits:
    first_token_seconds: float
    idle_seconds: float
    keepalive_seconds: float
    recovery_seconds: float


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0  # of the completion tokens
    first_token_seconds: float | None = None  # since the request arrived


def _call_ids(key: Key | None, choice: int) -> Callable[[], str]:
    draw = numbered_ids(key, f"call/{choice}", 12)
    return lambda: f"call_{draw()}"


class Session:
    """Use as an async context manager: ``await admitted()``, then iterate over ``batches()``.

    ``started_at`` is when the request arrived, by the event loop's clock: the limit to the first token counts from it.
    """

    def __init__(self, prepared: Prepared, limits: Limits, metrics: GatewayMetrics, started_at: float) -> None:
        self._prepared = prepared
        self._limits = limits
        self._metrics = metrics
        self._started_at = started_at
        self._deadline = started_at + limits.first_token_seconds
        self._shown_at = started_at  # when the client last had something, a keep-alive included
        self._queue: Mailbox[tuple[int, Item]] = Mailbox(QUEUE_EVENTS)
        self._backlog: list[tuple[int, Item]] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._not_admitted = set(range(len(prepared.sequences)))
        self._running = set(self._not_admitted)
        self._recovering: dict[int, ClusterError] = {}  # choices without an engine, and why
        self._paused_at = 0.0  # since when an admitted choice has none
        self._choices = [
            Choice(
                prepared.tokenizer,
                stop=prepared.ask.stop,
                stop_token_ids=sequence.stop_token_ids,
                every_token=sequence.sampling.top_logprobs is not None,
                markers=prepared.shape.markers,
            )
            for sequence in prepared.sequences
        ]
        self._splitters = [
            splitter_for(prepared.shape, _call_ids(prepared.ask.key, sequence.choice))
            for sequence in prepared.sequences
        ]
        self._echoes = Echoes([sequence.prompt for sequence in prepared.sequences] if prepared.ask.echo else ())
        self._resumed = [False] * len(prepared.sequences)
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._cached_tokens = 0
        self._cached: dict[int, int] = {}  # of the first choice of each prompt
        self.first_token_seconds: float | None = None

    @property
    def usage(self) -> Usage:
        return Usage(
            self._prepared.prompt_tokens,
            self._completion_tokens,
            self._cached_tokens,
            self._reasoning_tokens,
            self.first_token_seconds,
        )

    async def __aenter__(self) -> Session:
        for sequence in self._prepared.sequences:
            name = f"pump-{sequence.request_id}-{sequence.choice}"
            self._pumps.append(asyncio.create_task(self._pump(sequence), name=name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.close()
        for pump in self._pumps:
            pump.cancel()
        _, late = await asyncio.wait(self._pumps, timeout=CLOSE_SECONDS)
        if late:
            _log.warning(
                "engine streams do not close", request=self._prepared.sequences[0].request_id, streams=len(late)
            )

    async def admitted(self) -> None:
        """Return once every choice is admitted. Raises what the engine raised, or ``DeadlineExceeded``."""
        early: list[tuple[int, Item]] = []
        while self._not_admitted:
            for _, item in early:
                if isinstance(item, ClusterError):
                    raise item
            for choice, item in await self._receive():
                if isinstance(item, Admitted):
                    if choice in self._not_admitted:
                        self._not_admitted.discard(choice)
                        self._note_cached(choice, item.cached_tokens)
                elif not isinstance(item, Broken):
                    early.append((choice, item))
        self._backlog = early
        self._metrics.prompt_tokens.labels(self._prepared.model.id).inc(self._prepared.prompt_tokens)
        self._metrics.cached_tokens.labels(self._prepared.model.id).inc(self._cached_tokens)

    async def batches(self) -> AsyncGenerator[list[SessionEvent]]:
        """What happened, in order; events that are there at once come together. Raises typed errors."""
        received = self._metrics.completion_tokens.labels(self._prepared.model.id)
        while self._running:
            items = self._backlog or await self._receive()
            self._backlog = []
            before = self._completion_tokens
            batch: list[SessionEvent] = [] if items else [Waiting()]
            failure: ClusterError | None = None
            for choice, item in items:
                try:
                    self._advance(choice, item, batch)
                except ClusterError as error:
                    failure = error
                    break
            if self._completion_tokens > before:
                received.inc(self._completion_tokens - before)
            if batch:
                self._shown_at = asyncio.get_running_loop().time()
                yield batch
            if failure is not None:
                raise failure

    def _advance(self, index: int, item: Item, batch: list[SessionEvent]) -> None:
        if index not in self._running:
            return  # what was still on its way when a stop string ended the choice
        choice = self._choices[index]
        match item:
            case Scored(tokens):
                self._echoes.note(index, tokens)
            case Token() if self._prepared.ask.echo_only:
                batch += self._echoes.take(index)
                self._pumps[index].cancel()
                self._end(index, "length", batch)
            case Token():
                batch += self._echoes.take(index)
                pieces = choice.push(item)
                self._count_token()
                thought = self._thinking(index)
                complete = self._show(index, pieces, batch)
                self._reasoning_tokens += thought or self._thinking(index)
                if complete or choice.stopped:
                    self._pumps[index].cancel()
                    self._end(index, "stop", batch)
            case Finished(reason="cancelled"):
                raise Unavailable("the engine cancelled this sequence: send the request again")
            case Finished():
                if not self._resumed[index]:
                    self._note_cached(index, item.cached_tokens)
                self._show(index, choice.finish(), batch)
                self._end(index, "stop" if choice.stopped or item.reason == "stop" else "length", batch)
            case ClusterError():
                raise item

    def _note_cached(self, index: int, cached_tokens: int) -> None:
        """Expected at admission, known at the end. Choices share a prompt: the first one's hit is what it saved."""
        if index % self._prepared.ask.num_drawn == 0:
            self._cached[index] = cached_tokens
            self._cached_tokens = sum(self._cached.values())

    def _thinking(self, index: int) -> bool:
        splitter = self._splitters[index]
        return splitter is not None and splitter.thinking

    def _show(self, index: int, pieces: Sequence[Piece], batch: list[SessionEvent]) -> bool:
        """Split the pieces of a token into parts; returns whether the choice is complete with them."""
        splitter = self._splitters[index]
        if splitter is None:
            batch += [Delta(index, piece, self._completion_tokens) for piece in pieces]
            return False
        self._add(index, [part for piece in pieces for part in splitter.push(piece)], batch)
        return splitter.done

    def _add(self, index: int, parts: Sequence[Part], batch: list[SessionEvent]) -> None:
        for part in parts:
            event = Delta if isinstance(part, Piece) else PartDelta
            batch.append(event(index, part, self._completion_tokens))  # type: ignore[arg-type]  # each its own kind

    def _count_token(self) -> None:
        self._completion_tokens += 1
        if self.first_token_seconds is None:
            self.first_token_seconds = asyncio.get_running_loop().time() - self._started_at
            self._metrics.ttft_seconds.labels(self._prepared.model.id).observe(self.first_token_seconds)

    def _end(self, index: int, reason: Literal["stop", "length", "tool_calls"], batch: list[SessionEvent]) -> None:
        self._running.discard(index)
        splitter = self._splitters[index]
        if splitter is not None:
            self._add(index, splitter.finish(), batch)
            if splitter.num_calls and reason == "stop":
                reason = "tool_calls"
        batch.append(ChoiceEnd(index, reason, self._completion_tokens, self._choices[index].stop_string))

    async def _receive(self) -> list[tuple[int, Item]]:
        """Everything that is there, after waiting for the first; empty when it is time to show life.

        That time comes also while there is news that no client sees, such as attempts to find an engine.
        """
        time = asyncio.get_running_loop().time
        if self._queue.empty():
            # While choices recover, their own patience is the limit (``attempts``).
            deadline = math.inf if self._paused_at else self._deadline
            if time() >= deadline:
                raise self._too_late()
            try:
                items = await self._queue.take_until(min(deadline, self._shown_at + self._limits.keepalive_seconds))
            except TimeoutError:
                self._shown_at = time()
                return []
        else:
            items = self._queue.take()
        now = time()
        for choice, item in items:
            if isinstance(item, Token):
                self._deadline = now + self._limits.idle_seconds
            if self._recovering or isinstance(item, Broken):
                self._note_recovery(choice, item, now)
        return items

    def _note_recovery(self, choice: int, item: Item, now: float) -> None:
        """Stop the clock when an admitted choice loses its engine, and let it run again when all have one."""
        if isinstance(item, Broken):
            if choice not in self._recovering:
                self._metrics.broken_streams.labels(self._prepared.model.id).inc()
            self._recovering[choice] = item.error
            self._resumed[choice] = True
            if choice not in self._not_admitted and not self._paused_at:
                self._paused_at = now
            return
        self._recovering.pop(choice, None)
        if self._paused_at and self._recovering.keys() <= self._not_admitted:
            self._deadline += now - self._paused_at
            self._metrics.recovery_seconds.labels(self._prepared.model.id).observe(now - self._paused_at)
            self._paused_at = 0.0

    def _too_late(self) -> ClusterError:
        waits = next((error for choice, error in self._recovering.items() if choice in self._not_admitted), None)
        if waits is not None:
            return waits
        if self._completion_tokens == 0:
            return DeadlineExceeded(
                f"no token within {self._limits.first_token_seconds:g} s (api_gateway.timeout): the cluster is busy or "
                "the prompt is long; try later, or shorten the prompt"
            )
        return DeadlineExceeded(
            f"no token for {self._limits.idle_seconds:g} s (api_gateway.idle_timeout): the answer was given up"
        )

    async def _pump(self, sequence: SequenceRequest) -> None:
        """Carry one sequence's events into the session's queue. Cancelling this closes the stream."""
        put = self._queue.put
        try:
            while (rest := await self._carry(sequence)) is not None:
                sequence = rest
        except ClusterError as error:
            await put((sequence.choice, error))
        except Exception as error:  # noqa: BLE001 - this task's root
            _log.exception("engine stream failed", request=sequence.request_id, choice=sequence.choice)
            await put((sequence.choice, ClusterError(repr(error))))

    async def _carry(self, sequence: SequenceRequest) -> SequenceRequest | None:
        """Carry events until the end, or until the client has left them unread for ``PREEMPT_SECONDS``.

        Then the row is given back to others, and what is still to do is returned as soon as the client reads on: it
        goes behind the tokens received so far, as after a lost engine.
        """
        # Who was served already has been promised an answer.
        until = math.inf if sequence.emitted else self._started_at + self._limits.first_token_seconds
        stream = attempts(sequence, self._prepared.engine_for, Patience(self._limits.recovery_seconds, until))
        emitted: list[int] = []
        async with contextlib.aclosing(stream):
            async for event in stream:
                if isinstance(event, Token):
                    emitted.append(event.token_id)
                item = (sequence.choice, event)
                if not self._queue.is_full:
                    await self._queue.put(item)
                    continue
                late = asyncio.ensure_future(self._queue.put(item))
                try:
                    done, _ = await asyncio.wait({late}, timeout=PREEMPT_SECONDS)
                    if done or isinstance(event, Finished):
                        await late
                        continue
                    _log.info("slow reader preempted", request=sequence.request_id, choice=sequence.choice)
                    await stream.aclose()
                    await late
                finally:
                    late.cancel()
                break
            else:
                return None
        if (finished := already_complete(sequence, emitted)) is not None:
            await self._queue.put((sequence.choice, finished))
            return None
        return replace(sequence, emitted=(*sequence.emitted, *emitted), prompt_logprobs=None)
