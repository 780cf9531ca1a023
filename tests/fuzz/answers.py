"""What a right answer is, whatever was asked: a result, or an error in the dialect of who asked.

Owns: the exchange at the ASGI seam, the forms of results and errors.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tests.fuzz.mutate import Sent

EXCHANGE_SECONDS = 60.0
ERROR_STATUSES = frozenset({400, 403, 404, 405, 413, 415})


@dataclass(frozen=True, slots=True)
class Got:
    status: int
    headers: dict[str, str]
    body: bytes


async def exchange(app: Any, sent: Sent) -> Got:
    """What the application answers. Raises what it raises, and ``AssertionError`` for a broken ASGI sequence."""
    never = asyncio.Event()
    messages: list[dict[str, Any]] = []
    requests = [{"type": "http.request", "body": sent.body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await never.wait()
        raise AssertionError("nobody sets this")

    async def send(message: dict[str, Any]) -> None:
        messages.append(dict(message))

    headers = [(b"host", b"127.0.0.1:8000")] if not any(name == "host" for name, _ in sent.headers) else []
    headers += [(name.encode(), value.encode("latin-1", "replace")) for name, value in sent.headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path.replace("%00", "\x00"),
        "raw_path": sent.path.encode(),
        "root_path": "",
        "query_string": sent.query.encode(),
        "headers": headers,
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8000),
    }
    async with asyncio.timeout(EXCHANGE_SECONDS):
        await app(scope, receive, send)
    kinds = [message["type"] for message in messages]
    assert kinds, "no answer at all"
    assert kinds[0] == "http.response.start", kinds
    assert set(kinds[1:]) == {"http.response.body"}, kinds
    assert not messages[-1].get("more_body", False), "the answer has no end"
    head = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in messages[0]["headers"]}
    return Got(messages[0]["status"], head, b"".join(message.get("body", b"") for message in messages[1:]))


def check(sent: Sent, got: Got) -> str:
    """Raise ``AssertionError`` unless this is a well-formed answer; its kind in a word."""
    assert "x-request-id" in got.headers
    if "content-length" in got.headers:
        assert int(got.headers["content-length"]) == len(got.body)
    if got.status in (200, 204):
        return _check_result(got)
    assert got.status in ERROR_STATUSES, f"status {got.status}: {got.body[:300]!r}"
    _check_error(sent, got)
    return "error"


def _check_error(sent: Sent, got: Got) -> None:
    assert got.headers["content-type"] == "application/json"
    body = json.loads(got.body)
    if sent.path.startswith("/api/"):  # Ollama's
        assert set(body) == {"error"}
        assert isinstance(body["error"], str)
        assert body["error"]
        return
    error = body["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(error["message"]) < 2000
    assert "Traceback" not in error["message"]
    anthropic = sent.path == "/v1/messages" or sent.path.startswith("/v1/messages/")
    if anthropic or any(name == "anthropic-version" for name, _ in sent.headers):
        assert body["type"] == "error"
        assert set(error) == {"type", "message"}
        assert body["request_id"] == got.headers["x-request-id"]
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] != "internal_error"
        assert error["param"] is None or isinstance(error["param"], str)
        named = got.status != 400 or error["param"] is not None or error["code"] in ("invalid_json", "host_not_allowed")
        assert named, f"a 400 that names no parameter: {error}"


def _check_result(got: Got) -> str:
    kind = got.headers.get("content-type", "")
    if kind.startswith("application/json"):
        json.loads(got.body)
        return "result"
    if kind.startswith("application/x-ndjson"):
        lines = [json.loads(line) for line in got.body.splitlines()]
        assert lines[-1].get("done") is True or "error" in lines[-1]
        return "stream"
    if kind.startswith("text/event-stream"):
        _check_stream(got.body)
        return "stream"
    return "other"


def _check_stream(body: bytes) -> None:
    assert body.endswith(b"\n\n")
    events: list[Any] = []
    for block in body[:-2].split(b"\n\n"):
        lines = block.split(b"\n")
        data = [line[6:] for line in lines if line.startswith(b"data: ")]
        assert all(line.startswith((b"data: ", b"event: ", b":")) for line in lines), block
        assert len(data) <= 1, block
        if data:
            events.append("[DONE]" if data[0] == b"[DONE]" else json.loads(data[0]))
    last = events[-1]
    if last == "[DONE]":
        assert not any(isinstance(event, dict) and "error" in event for event in events), events[-2]
        return
    assert last["type"] in ("message_stop", "response.completed", "response.incomplete"), last
