"""Server-sent events on one ASGI exchange.

Owns: the head of the response, writing with a deadline, comments, the end.
Does not own: what stands in an event (a dialect's module).
Invariant: every write has a deadline, so a client that stops reading cannot hold an engine's rows: up to a bound it is
waited for (the events that are ready, then the engine's stream, stand still), then its sequences are cancelled.
"""

from __future__ import annotations

from mlx_cluster.gateway.client import Message, Send, send_before, send_within
from mlx_cluster.gateway.errors import SlowReader

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

EVENT_STREAM = b"text/event-stream; charset=utf-8"
_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies would collect the events otherwise
]


class EventWriter:
    """``send_body`` takes the parts between the status and the end: the server's own, which nobody in between counts.

    Every method raises ``ClientGone`` when the client left; ``write`` raises ``SlowReader`` when it is only slow.

    After a ``SlowReader`` one more ``write`` may tell the client why its stream ends, should it read on.
    """

    def __init__(
        self, send: Send, send_body: Send, write_timeout_seconds: float, content_type: bytes = EVENT_STREAM
    ) -> None:
        self._send, self._send_body = send, send_body
        self._headers = [(b"content-type", content_type), *_HEADERS]
        self._seconds = write_timeout_seconds

    async def start(self) -> None:
        """Send the status; from here on errors are events."""
        message = {"type": "http.response.start", "status": 200, "headers": self._headers}
        await send_within(self._send, message, self._seconds)

    async def write(self, data: bytes) -> None:
        """One or more whole events."""
        message: Message = {"type": "http.response.body", "body": data, "more_body": True}
        if not await send_before(self._send_body, message, self._seconds):
            raise SlowReader(
                f"nothing was read from this stream for {self._seconds:g} s (api_gateway.slow_reader_timeout): the "
                "answer was given up; read it faster, or ask without stream"
            )

    async def end(self) -> None:
        await send_within(self._send, {"type": "http.response.body", "body": b"", "more_body": False}, self._seconds)
