"""The chat's side of the HTTP API."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from mlx_cluster.cli.chat import first_model, stream_chat, text_of_events
from mlx_cluster.errors import Unavailable


def client(serve: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(base_url="http://gateway/v1", transport=httpx.MockTransport(serve))


def event(**delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta}]})


def test_text_comes_in_pieces_until_done() -> None:
    lines = [
        event(role="assistant"),
        ": keep-alive",
        "",
        event(reasoning_content="hm "),
        event(content="a"),
        "data: [DONE]",
    ]
    assert list(text_of_events(lines)) == ["hm ", "a"]


def test_an_error_in_the_stream_is_raised_with_its_words() -> None:
    lines = [event(content="a"), 'data: {"error": {"message": "stage 1 is gone"}}', "data: [DONE]"]
    with pytest.raises(Unavailable, match="stage 1 is gone"):
        list(text_of_events(lines))


def test_a_cut_stream_is_an_error() -> None:
    with pytest.raises(Unavailable, match="before the answer did"):
        list(text_of_events([event(content="a")]))


def test_a_chat_request() -> None:
    seen: list[httpx.Request] = []

    def serve(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, text=f"{event(content='hi')}\n\ndata: [DONE]\n\n")

    with client(serve) as http:
        assert list(stream_chat(http, {"model": "demo", "stream": True})) == ["hi"]
    assert str(seen[0].url) == "http://gateway/v1/chat/completions"
    assert json.loads(seen[0].content) == {"model": "demo", "stream": True}


def test_a_refusal_is_raised_with_the_servers_words() -> None:
    with (
        client(lambda _: httpx.Response(503, json={"error": {"message": "loading"}})) as http,
        pytest.raises(Unavailable, match="HTTP 503: loading"),
    ):
        list(stream_chat(http, {}))


def test_the_first_model() -> None:
    with client(lambda _: httpx.Response(200, json={"data": [{"id": "demo"}, {"id": "b"}]})) as http:
        assert first_model(http) == "demo"
    with client(lambda _: httpx.Response(200, json={"data": []})) as http, pytest.raises(Unavailable, match="no model"):
        first_model(http)


def test_no_gateway() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client(refuse) as http, pytest.raises(Unavailable, match="mlx-cluster up"):
        first_model(http)
