"""How an error looks in Anthropic's dialect: their envelope, their types, and 529 where a cluster is not ready.

Owns: which exchanges speak that dialect, and the form of their errors.
Does not own: the error tree, retry headers (``errors``).
Invariant: an error that is not in the table is an ``api_error`` that says nothing but the request id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_cluster.errors import ClusterError, DeadlineExceeded, Overloaded, QueueTimeout, Unavailable
from mlx_cluster.gateway.errors import error_body, form_of

PATH = "/v1/messages"
OVERLOADED_STATUS = 529

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
}


def asked(scope: Mapping[str, Any]) -> bool:
    """Whether who asks speaks Anthropic's dialect: by the path, or by the version header of their SDKs."""
    path: str = scope["path"]
    return (
        path == PATH or path.startswith(f"{PATH}/") or any(name == b"anthropic-version" for name, _ in scope["headers"])
    )


def status_of(error: BaseException) -> int:
    return OVERLOADED_STATUS if isinstance(error, Unavailable | QueueTimeout) else form_of(error).status


def error_type(error: BaseException) -> str:
    if isinstance(error, Overloaded) and not isinstance(error, QueueTimeout):
        return "rate_limit_error"
    if isinstance(error, Unavailable | QueueTimeout):
        return "overloaded_error"
    if isinstance(error, DeadlineExceeded):
        return "timeout_error"
    status = form_of(error).status
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def envelope(error: BaseException, request_id: str) -> bytes:
    message = error_body(error, request_id)["error"]["message"]
    param = getattr(error, "param", None) if isinstance(error, ClusterError) else None
    if param is not None and not message.startswith(param):
        message = f"{param}: {message}"  # the envelope has no place of its own for it
    body = {"type": "error", "error": {"type": error_type(error), "message": message}, "request_id": request_id}
    return json.dumps(body, ensure_ascii=False).encode()
