"""How an error looks to a client: one table from the project's errors to HTTP, in OpenAI's form.

Owns: status, ``type``, ``code``, ``param`` and the retry headers of every error, and the HTTP-only errors below.
Does not own: the error tree (``mlx_cluster.errors``).
Invariant: an error that is not in the table is a 500 that says nothing but the request id.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_cluster.errors import (
    ClusterError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    QueueTimeout,
    RowFailed,
    StageLost,
    Superseded,
    Unavailable,
)


class Forbidden(InvalidRequest):
    """The exchange comes under a name or from a page that this gateway does not answer to."""

    code = "forbidden"


class PayloadTooLarge(InvalidRequest):
    """The body is longer than ``api_gateway.max_body_bytes``."""

    code = "request_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared to be JSON."""

    code = "unsupported_media_type"


class RouteNotFound(InvalidRequest):
    """No such path."""

    code = "not_found"


class ResponseNotFound(InvalidRequest):
    """No stored response has this id."""

    code = "response_not_found"


class HeadersTooLarge(InvalidRequest):
    """The request's headers together are longer than a gateway reads."""

    code = "headers_too_large"


class SlowReader(ClusterError):
    """The client did not take what it was sent for ``api_gateway.slow_reader_timeout``."""

    code = "slow_reader"


class MethodNotAllowed(InvalidRequest):
    """The path exists, with another method."""

    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTimeout(InvalidRequest):
    """The client did not send its body in time."""

    code = "request_timeout"


@dataclass(frozen=True, slots=True)
class HttpForm:
    """Status and OpenAI ``type``; ``retry_is_useless`` tells the SDKs not to try a 5xx again by themselves."""

    status: int
    type: str
    retry_is_useless: bool = False


# The first class in an error's method resolution order that stands here decides.
FORMS: Mapping[type[ClusterError], HttpForm] = {
    InvalidRequest: HttpForm(400, "invalid_request_error"),
    ContextLengthExceeded: HttpForm(400, "invalid_request_error"),
    Forbidden: HttpForm(403, "invalid_request_error"),
    ModelNotFound: HttpForm(404, "invalid_request_error"),
    RouteNotFound: HttpForm(404, "invalid_request_error"),
    ResponseNotFound: HttpForm(404, "invalid_request_error"),
    # Nobody waits for this one any more: trying again would only take the answer from the newer connection.
    Superseded: HttpForm(409, "invalid_request_error", retry_is_useless=True),
    MethodNotAllowed: HttpForm(405, "invalid_request_error"),
    # The SDKs retry 408 by themselves, and a client that could not send its body once will not the second time.
    BodyTimeout: HttpForm(408, "invalid_request_error", retry_is_useless=True),
    PayloadTooLarge: HttpForm(413, "invalid_request_error"),
    UnsupportedMediaType: HttpForm(415, "invalid_request_error"),
    HeadersTooLarge: HttpForm(431, "invalid_request_error"),
    Overloaded: HttpForm(429, "rate_limit_error"),
    # Not the client's rate: the cluster was too slow. ``Retry-After`` is how long the queue takes to pass.
    QueueTimeout: HttpForm(503, "server_error"),
    Unavailable: HttpForm(503, "server_error"),
    StageLost: HttpForm(503, "server_error"),
    RowFailed: HttpForm(500, "server_error", retry_is_useless=True),
    # Whoever waited the whole limit in a long queue only makes the queue longer by asking twice more.
    DeadlineExceeded: HttpForm(504, "server_error", retry_is_useless=True),
    SlowReader: HttpForm(504, "server_error", retry_is_useless=True),  # only ever within a stream
}
# Clients wait as long as they are told, and some longer than their users: nothing here is worth more.
MAX_RETRY_AFTER_SECONDS = 120.0
INTERNAL = HttpForm(500, "server_error", retry_is_useless=True)


def form_of(error: BaseException) -> HttpForm:
    for kind in type(error).__mro__:
        form = FORMS.get(kind)
        if form is not None:
            return form
    return INTERNAL


def is_internal(error: BaseException) -> bool:
    """Whether the error is nobody's but ours: log it with its traceback."""
    return form_of(error) is INTERNAL


def error_body(error: BaseException, request_id: str) -> dict[str, Any]:
    """OpenAI's error object: message, type, param and code, the last two null when there is none."""
    form = form_of(error)
    if form is INTERNAL:
        message, code = f"internal error; the node's log has it under request id {request_id}", ClusterError.code
        return {"error": {"message": message, "type": form.type, "param": None, "code": code}}
    param, exact_code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error), "type": form.type, "param": param, "code": exact_code}}


def error_bytes(error: BaseException, request_id: str) -> bytes:
    return json.dumps(error_body(error, request_id)).encode()


def error_headers(error: BaseException) -> dict[str, str]:
    headers: dict[str, str] = {}
    seconds = getattr(error, "retry_after_seconds", None)
    if seconds is not None:
        seconds = min(seconds, MAX_RETRY_AFTER_SECONDS)
        headers["retry-after"] = str(max(1, math.ceil(seconds)))  # the header knows whole seconds only
        headers["retry-after-ms"] = str(math.ceil(seconds * 1000))
    if form_of(error).retry_is_useless:
        headers["x-should-retry"] = "false"
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    return headers
