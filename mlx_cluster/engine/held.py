"""Generations that a client may attach to again: an engine in front of an engine.

Owns: the generations of requests with a ``key``, what was heard of each, who is attached, and for how long one without
an attachment is held.
Does not own: the computation (the engine behind it), how a key comes about (the gateways).
Invariants: a generation has at most one attachment, the newest, and the one before it hears ``Superseded``; one that
nobody is attached to is cancelled, or forgotten where it is whole, after the window, and earlier when there are too
many or they take too many bytes; a key never stands for two bodies.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_cluster import log
from mlx_cluster.errors import ClusterError, IdempotencyKeyReused, Superseded, Unavailable
from mlx_cluster.request import Admitted, Engine, Event, Finished, Scored, SequenceRequest, Token

_log = log.get("engine.held")

# How long closing the stream of a generation may take before it is left to itself.
CLOSE_SECONDS = 5.0
# Without an attachment: those that still take rows, and all of them. The oldest goes first.
MAX_LEFT_RUNNING = 32
MAX_LEFT = 1024
# What Python takes for them, roughly.
GENERATION_BYTES = 1024
ID_BYTES = 8
EVENT_BYTES = 160
ALTERNATIVE_BYTES = 120

_Place = tuple[str, str]  # a tenant, and its name for a request


def _num_bytes(event: Event) -> int:
    match event:
        case Token(top=top):
            return EVENT_BYTES + ALTERNATIVE_BYTES * len(top)
        case Scored(tokens):
            return EVENT_BYTES + sum(map(_num_bytes, tokens))
        case _:
            return EVENT_BYTES


def _parts(key: str) -> tuple[str, str]:
    """A key's name, and its body."""
    name, _, body = key.partition(":")
    return name, body


@dataclass(slots=True, eq=False)
class _Generation:
    """One sequence: all that was heard of it, and a future that is done when there is news.

    Once it is not ``replayable`` what was delivered is dropped: ``num_dropped`` events of its beginning are missing.
    """

    request: SequenceRequest
    heard: list[Event | ClusterError] = field(default_factory=list)
    num_dropped: int = 0
    num_bytes: int = 0
    state: Literal["running", "whole", "broken"] = "running"
    replayable: bool = True
    attachment: object | None = None
    expiry: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    news: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def at(self, position: int, attachment: object) -> Event | ClusterError:
        """What was heard at this place, as soon as it is. Raises ``Superseded`` once another attachment has come."""
        while True:
            if self.attachment is not attachment:
                raise Superseded(
                    "the same Idempotency-Key was sent again: the answer goes on over the newer connection"
                )
            if position - self.num_dropped < len(self.heard):
                return self.heard[position - self.num_dropped]
            await asyncio.shield(self.news)

    def attach(self, attachment: object) -> None:
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        self.attachment = attachment
        self.tell()

    def tell(self) -> None:
        news, self.news = self.news, asyncio.get_running_loop().create_future()
        news.set_result(None)

    def drop_until(self, position: int) -> None:
        del self.heard[: position - self.num_dropped]
        self.num_dropped = position

    def serves(self, request: SequenceRequest) -> bool:
        """Whether an attachment of this request finds here what it lacks, and nothing else before it."""
        if not self.replayable:
            return False
        # Ids that this one itself was given came without their log probabilities, and without the prompt's.
        scored = request.sampling.top_logprobs is not None or request.prompt_logprobs is not None
        if scored and len(request.emitted) < len(self.request.emitted):
            return False
        tokens = [event.token_id for event in self.heard if isinstance(event, Token)]
        return tuple(tokens[: len(request.emitted)]) == request.emitted


class HeldEngine:
    """Implements ``request.Engine`` in front of ``inner``, for requests with a key."""

    def __init__(self, inner: Engine, window_seconds: float, max_bytes: int) -> None:
        self._inner, self._window_seconds, self._max_bytes = inner, window_seconds, max_bytes
        self._held: dict[_Place, dict[int, _Generation]] = {}  # by choice
        self._left: dict[_Generation, None] = {}  # without an attachment, the oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_bytes = 0
        self._num_attached_again = 0

    def statistics(self) -> dict[str, Any]:
        return {
            "generations_held": sum(map(len, self._held.values())),
            "held_unattached": len(self._left),
            "held_bytes": self._num_bytes,
            "attached_again": self._num_attached_again,
        }

    def close(self) -> None:
        """The engine has stopped: forget all that nobody is attached to. Attachments hear how the engine ended."""
        for generation in list(self._left):
            self._end(generation)

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """See ``request.Engine``. Closing the generator leaves the generation for whoever attaches again.

        Raises ``IdempotencyKeyReused`` for a key that stands for another body, and ``Superseded``.
        """
        if not request.key:
            raise ValueError("a request without a key has nothing to attach to: it belongs to the engine behind this")
        generation, mine = self._generation(request), object()
        generation.attach(mine)
        self._left.pop(generation, None)
        try:
            position = 0
            while True:
                heard = await generation.at(position, mine)
                position += 1
                if not generation.replayable:
                    generation.drop_until(position)
                if isinstance(heard, ClusterError):
                    raise copy.copy(heard)  # each attachment adds its own traceback
                if _lacks(request, heard):
                    yield heard
                if isinstance(heard, Finished):
                    return
        finally:
            if generation.attachment is mine:
                await self._leave(generation)

    def _generation(self, request: SequenceRequest) -> _Generation:
        """The one that is held for this request, or a new one."""
        name, body = _parts(request.key)
        choices = self._held.setdefault((request.tenant, name), {})
        for other in choices.values():
            if _parts(other.request.key)[1] != body:
                raise IdempotencyKeyReused(
                    "this Idempotency-Key was sent with another body: send the same one, or another key"
                )
        found = choices.get(request.choice)
        if found is not None and found.serves(request):
            self._num_attached_again += 1
            _log.info("attached again", request=request.request_id, choice=request.choice, heard=len(found.heard))
            return found
        if found is not None:
            self._end(found)
            choices = self._held.setdefault((request.tenant, name), {})
        made = choices[request.choice] = _Generation(request)
        self._add_bytes(made, GENERATION_BYTES + ID_BYTES * (len(request.prompt) + len(request.emitted)))
        made.task = asyncio.create_task(self._compute(made), name=f"held {request.request_id}")
        self._tasks.add(made.task)
        made.task.add_done_callback(self._tasks.discard)
        return made

    async def _compute(self, generation: _Generation) -> None:
        """Carry the computation into ``generation``; cancelling this ends it."""
        request = generation.request
        try:
            async with contextlib.aclosing(self._inner.generate(request)) as events:
                async for event in events:
                    self._hear(generation, event)
                    if isinstance(event, Admitted):
                        for index, token_id in enumerate(request.emitted):  # for whoever begins from the first
                            self._hear(generation, Token(index, token_id))
            if generation.state == "running":
                self._hear(generation, Unavailable("the engine's stream ended early: send the request again"))
        except ClusterError as error:
            self._hear(generation, error)
        except Exception as error:  # noqa: BLE001 - this task's root
            _log.exception("held generation failed", request=request.request_id)
            self._hear(generation, ClusterError(repr(error)))
        finally:
            if generation.state != "whole":
                self._forget(generation)  # who comes now begins a new one, with the same seed

    def _hear(self, generation: _Generation, event: Event | ClusterError) -> None:
        generation.heard.append(event)
        if isinstance(event, ClusterError):
            generation.state = "broken"
        else:
            if isinstance(event, Finished):
                generation.state = "broken" if event.reason == "cancelled" else "whole"
            self._add_bytes(generation, _num_bytes(event))
        generation.tell()

    def _add_bytes(self, generation: _Generation, num_bytes: int) -> None:
        """Count what is kept. Beyond the bound those go that nobody is attached to, then this one is not kept whole."""
        if not generation.replayable or not self._is_held(generation):
            return
        generation.num_bytes += num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes and self._left:
            self._end(next(iter(self._left)))
        if self._num_bytes > self._max_bytes and generation.replayable and self._is_held(generation):
            _log.warning("too long to be held", request=generation.request.request_id, max_bytes=self._max_bytes)
            generation.replayable = False
            self._num_bytes -= generation.num_bytes
            generation.num_bytes = 0

    async def _leave(self, generation: _Generation) -> None:
        """Its attachment is gone: hold it, or cancel it at once where there is nothing to replay."""
        generation.attachment = None
        if not self._is_held(generation):
            return
        if not generation.heard or not generation.replayable:
            task = self._end(generation)
            if task is not None:
                _, late = await asyncio.wait({task}, timeout=CLOSE_SECONDS)
                if late:
                    _log.warning("the engine's stream does not close", request=generation.request.request_id)
            return
        self._left[generation] = None
        generation.expiry = asyncio.get_running_loop().call_later(self._window_seconds, self._end, generation)
        running = [each for each in self._left if each.state == "running"]
        for each in running[: len(running) - MAX_LEFT_RUNNING] if len(running) > MAX_LEFT_RUNNING else ():
            self._end(each)
        while len(self._left) > MAX_LEFT:
            self._end(next(iter(self._left)))

    def _end(self, generation: _Generation) -> asyncio.Task[None] | None:
        """Forget it, and cancel it if it runs: then its task is returned. An attachment hears that it is superseded."""
        self._forget(generation)
        generation.attachment = None
        generation.tell()
        task = generation.task
        if task is None or task.done():
            return None
        task.cancel()
        return task

    def _is_held(self, generation: _Generation) -> bool:
        place = (generation.request.tenant, _parts(generation.request.key)[0])
        return self._held.get(place, {}).get(generation.request.choice) is generation

    def _forget(self, generation: _Generation) -> None:
        self._left.pop(generation, None)
        if generation.expiry is not None:
            generation.expiry.cancel()
            generation.expiry = None
        if not self._is_held(generation):
            return
        self._num_bytes -= generation.num_bytes
        place = (generation.request.tenant, _parts(generation.request.key)[0])
        del self._held[place][generation.request.choice]
        if not self._held[place]:
            del self._held[place]


def _lacks(request: SequenceRequest, event: Event) -> bool:
    """Whether this event is news to whoever comes with ``emitted`` ids."""
    match event:
        case Token(index=index):
            return index >= len(request.emitted)
        case Scored():
            return request.prompt_logprobs is not None
        case _:
            return True
