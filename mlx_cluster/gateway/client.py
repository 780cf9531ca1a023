"""The client's side of one HTTP exchange: its body, and whether it is still there.

Owns: reading a body within its limits, and cancelling work when the client leaves.
Does not own: what the body means (``schemas``).
Invariant: a client that leaves cancels its work, streaming or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, MutableMapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.errors import BodyTimeout, PayloadTooLarge, UnsupportedMediaType
from mlx_cluster.gateway.idempotency import note_body

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# In an exchange's state: what sends the parts of a body before the last one, past all middleware: none looks at them.
SEND_BODY = "send_body"


class ClientGone(Exception):
    """The client closed its connection, or stopped reading; there is nobody to answer."""


async def read_json_body(request: Request, *, max_bytes: int, timeout_seconds: float) -> bytes:
    """The raw body of a JSON request.

    Raises ``UnsupportedMediaType``, ``PayloadTooLarge``, ``BodyTimeout``, ``InvalidRequest`` or ``ClientGone``.
    """
    # Browsers send JSON across origins only after asking first, but plain forms without: insisting on the type keeps
    # other people's pages from using a gateway on loopback.
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(
            f"content-type is {content_type[:64]!r}: send the body as JSON with Content-Type: application/json"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_seconds):
            raw = await _collect(request, max_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_seconds:g} s: send it again") from None
    except ClientDisconnect:
        raise ClientGone from None
    note_body(request, raw)
    return raw


async def _collect(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    if not total:
        raise InvalidRequest("the body is empty: send a JSON object", code="invalid_json")
    return b"".join(parts)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body is longer than {max_bytes} bytes: send less, or raise api_gateway.max_body_bytes on the server"
    )


async def send_within(send: Send, message: Message, seconds: float) -> None:
    """Send one ASGI message. Raises ``ClientGone`` when the client does not take it in time, or is not there."""
    if not await send_before(send, message, seconds):
        raise ClientGone


async def send_before(send: Send, message: Message, seconds: float) -> bool:
    """Send one ASGI message; False when the client did not take it in time. Raises ``ClientGone`` when it left."""
    steps = send(message).__await__()
    try:
        # A server nearly always has room for a message, and sends it without waiting: a deadline for each one would
        # cost more than the message. Only where it does wait, it goes on under one.
        waits_for = next(steps)
    except StopIteration:
        return True
    except OSError:
        raise ClientGone from None
    try:
        async with asyncio.timeout(seconds):
            await _Rest(waits_for, steps)
    except TimeoutError:
        return False
    except OSError:
        raise ClientGone from None
    return True


class _Rest:
    """What is left of an awaitable that was begun by hand: ``waits_for`` is what it waits for first."""

    def __init__(self, waits_for: Any, steps: Generator[Any, Any, Any]) -> None:
        self._waits_for, self._steps = waits_for, steps

    def __await__(self) -> Generator[Any, Any, Any]:
        waits_for = self._waits_for
        while True:
            thrown: BaseException | None = None
            answer: Any = None
            try:
                answer = yield waits_for
            except BaseException as error:  # noqa: BLE001 - handed on: whoever waits hears of it, cancelling included
                thrown = error
            try:
                waits_for = self._steps.send(answer) if thrown is None else self._steps.throw(thrown)
            except StopIteration as end:
                return end.value


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; cancels it and raises ``ClientGone`` when the client leaves first.

    Starlette does this for streams only. The request's body must have been read before.
    """
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
