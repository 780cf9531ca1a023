"""What surrounds every exchange: its request id, who may ask at all, its last line of defence, its count.

Owns: ``x-request-id``, the answer to any error that was not answered yet, preflights, request metrics.
Does not own: routes, which hosts and origins are let in (``origin``).
Invariant: every error before the status becomes an error object of the client's dialect; an unforeseen one is logged
with its traceback.

Room: authentication and rate limits belong here, after the check of Host and Origin and before the application.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp

from mlx_cluster import log
from mlx_cluster.errors import ClusterError
from mlx_cluster.gateway import messages_errors, ollama_dialect
from mlx_cluster.gateway.client import SEND_BODY, ClientGone, Message, Receive, Send
from mlx_cluster.gateway.errors import HeadersTooLarge, error_bytes, error_headers, form_of, is_internal
from mlx_cluster.gateway.origin import Headers, OriginPolicy
from mlx_cluster.metrics import GatewayMetrics

_log = log.get("gateway")

_ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
ANSWER_HEADERS = "answer_headers"  # in the exchange's state: more headers for its answer, whatever it will be
MAX_HEADERS_BYTES = 64 * 1024
CLIENT_GONE_STATUS = 499  # never sent, only counted


class Exchange:
    """Pure ASGI: a middleware that copies bodies would cost more than the gateway's own work per token."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, policy: OriginPolicy) -> None:
        self._app = app
        self._policy = policy
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"], state[SEND_BODY] = request_id, send
        asked = dict(scope["headers"])
        origin = _text(asked.get(b"origin"))
        own_headers = [(b"x-request-id", request_id.encode()), *self._policy.answer_headers(origin)]
        status = 0
        counted = False
        started_at = time.monotonic()

        def count() -> None:
            nonlocal counted
            if not counted:
                counted = True
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(status or 500)).inc()
                self._metrics.request_seconds.labels(route).observe(time.monotonic() - started_at)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *own_headers,
                    *scope["state"].get(ANSWER_HEADERS, ()),
                ]
            elif not message.get("more_body", False):
                count()  # before the client can see the end: whoever then looks at the metrics finds itself counted
            await send(message)

        try:
            _check_headers(scope["headers"])
            self._policy.check(_text(asked.get(b"host")), origin)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
                await _send_whole(send_with_id, 204, self._policy.preflight_headers(asked), b"")
            else:
                await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = CLIENT_GONE_STATUS
        except Exception as error:
            # The root of an exchange: the client gets its answer, the log the traceback.
            if is_internal(error):
                _log.error("request failed", request=request_id, path=scope["path"], exc_info=error)
            if status:
                raise  # the answer was under way: the server closes the connection
            await _send_error(error, request_id, send_with_id, scope)
        finally:
            count()


async def _send_error(error: Exception, request_id: str, send: Send, scope: Any) -> None:
    status, body = form_of(error).status, b""
    if ollama_dialect.asked(scope):  # by its paths, whatever else a client sends along
        body = ollama_dialect.error_bytes(error, request_id)
    elif messages_errors.asked(scope):
        status, body = messages_errors.status_of(error), messages_errors.envelope(error, request_id)
    else:
        body = error_bytes(error, request_id)
    _log.info("refused", request=request_id, status=status, code=getattr(error, "code", ClusterError.code))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
    await _send_whole(send, status, [(name.encode(), value.encode()) for name, value in headers.items()], body)


async def _send_whole(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _check_headers(headers: Headers) -> None:
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes > MAX_HEADERS_BYTES:
        raise HeadersTooLarge(
            f"the headers have {num_bytes} bytes, {MAX_HEADERS_BYTES} are read: send fewer, or shorter"
        )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id when it is harmless in logs and headers, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _ACCEPTABLE_ID.fullmatch(value):
            return value.decode()
    return f"req_{secrets.token_hex(12)}"
