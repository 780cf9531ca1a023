"""One sequence over as many engine streams as it takes: what breaks is asked for again with the ids received so far.

Owns: when an attempt is over, what may be tried again and until when, the pauses in between, which tokens count.
Does not own: text and clients (``session``), which engine serves a model (the routes).
Invariant: tokens are yielded with the indices 0, 1, 2 … without a gap or a repetition, whatever the attempts did: only
the present attempt is read, and only tokens whose index is the number received so far are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from mlx_cluster import log
from mlx_cluster.errors import ClusterError, Overloaded, Recovering, Unavailable
from mlx_cluster.request import Admitted, Engine, Event, Finished, SequenceRequest, Token

_log = log.get("gateway.attempts")

# Pauses between attempts: full jitter, so that a hundred streams of a lost engine do not come back in one moment.
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream to the engine is lost; the next attempt follows. ``error`` says why."""

    error: ClusterError


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a sequence waits for an engine.

    ``recovery_seconds`` counts from the loss, or from the last token that came after it; one that no engine has taken
    yet does not wait beyond ``until`` either (the loop's clock).
    """

    recovery_seconds: float
    until: float


async def attempts(
    request: SequenceRequest,
    engine_for: Callable[[], Engine],
    patience: Patience,
    draw: Callable[[], float] = random.random,
) -> AsyncGenerator[Event | Broken]:
    """``Admitted``, tokens, ``Finished``, with ``Broken`` … ``Admitted`` in between for each lost stream.

    ``engine_for`` is asked anew for every attempt. Raises the last error when patience ends, and at once what trying
    again would not change.
    """
    emitted: list[int] = []
    loop = asyncio.get_running_loop()
    lost_at: float | None = None
    admitted = complete = False
    failures = 0
    while True:
        try:
            engine = engine_for()
            stream = engine.generate(_rest(request, emitted))
            async with contextlib.aclosing(stream):
                async for event in stream:
                    match event:
                        case Admitted():
                            admitted = True
                        case Token(index=index, token_id=token_id):
                            if index != len(request.emitted) + len(emitted):
                                raise ClusterError(
                                    f"the engine sent token {index} where token "
                                    f"{len(request.emitted) + len(emitted)} was due"
                                )
                            emitted.append(token_id)
                            lost_at, failures = None, 0
                        case Finished():
                            complete = True
                    yield event
            if complete:
                return
            raise Unavailable("the engine's stream ended early: send the request again")
        except (Unavailable, Overloaded) as error:
            if not _may_pass(error, admitted=admitted):
                raise
            now = loop.time()
            lost_at = now if lost_at is None else lost_at
            if (finished := already_complete(request, emitted)) is not None:
                yield finished
                return
            ends = lost_at + patience.recovery_seconds
            if not admitted:
                ends = min(ends, patience.until)
            pause = draw() * min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 16))
            if now + pause >= ends:
                raise _given_up(error, patience, admitted=admitted) from error
            tell = _log.info if failures == 0 else _log.debug
            tell(
                "stream broke" if failures == 0 else "no engine yet",
                request=request.request_id,
                choice=request.choice,
                emitted=len(emitted),
                code=error.code,
                reason=str(error),
            )
            failures += 1
            yield Broken(error)
        await asyncio.sleep(pause)


def _rest(request: SequenceRequest, emitted: list[int]) -> SequenceRequest:
    """What is still to do. The prompt's log probabilities were told before its first token, and cost a prefill."""
    if not emitted:
        return request
    return replace(request, emitted=(*request.emitted, *emitted), prompt_logprobs=None)


def _may_pass(error: ClusterError, *, admitted: bool) -> bool:
    """Whether another attempt may fare better.

    Whoever was admitted has been promised an answer. New work waits for a pipeline that is coming back, and for an
    engine that was lost a moment ago, but is told at once that a model is not loaded yet or the queue is full.
    """
    return admitted or isinstance(error, Recovering)


def already_complete(request: SequenceRequest, emitted: list[int]) -> Finished | None:
    """The end of a sequence whose last token came through, but not the word that it was the last."""
    count = len(request.emitted) + len(emitted)
    if emitted and emitted[-1] in request.stop_token_ids:
        return Finished("stop", len(request.prompt), count)
    if emitted and count >= request.max_tokens:
        return Finished("length", len(request.prompt), count)
    return None


def _given_up(error: Unavailable | Overloaded, patience: Patience, *, admitted: bool) -> ClusterError:
    if not admitted:
        return error
    text = f"{error}; not resumed within {patience.recovery_seconds:g} s (api_gateway.recovery_timeout)"
    return type(error)(text, retry_after_seconds=error.retry_after_seconds)
