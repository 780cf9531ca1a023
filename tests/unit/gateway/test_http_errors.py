"""Errors over real HTTP: always an OpenAI error object, with a real status as long as none was sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from mlx_cluster.errors import Overloaded, RowFailed, StageLost, Unavailable
from tests.fake_engine import Script
from tests.unit.gateway.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/chat/completion", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/unknown", 404, "model_not_found"),
    ],
)
async def test_unknown_routes_and_wrong_methods(world: World, method: str, path: str, status: int, code: str) -> None:
    answer = await world.http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    if status == 405:
        assert answer.headers["allow"] in ("POST", "GET")


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{oops", "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b" " * 70_000, "application/json", 413, "request_too_large"),
        (b"{}", "application/json", 400, "missing_required_parameter"),
        (json.dumps({**CHAT, "max_tokens": -1}).encode(), "application/json", 400, "invalid_value"),
        (json.dumps({**CHAT, "bogus": 1}).encode(), "application/json", 400, "unknown_parameter"),
    ],
)
async def test_bad_bodies(world: World, content: bytes, content_type: str, status: int, code: str) -> None:
    answer = await world.http.post(PATH, content=content, headers={"content-type": content_type})
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


async def test_a_body_that_does_not_say_its_length_is_limited_too(world: World) -> None:
    async def endless() -> Any:
        for _ in range(70):
            yield b" " * 1024

    answer = await world.http.post(PATH, content=endless(), headers={"content-type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")


async def test_an_unknown_model_says_which_there_are(world: World) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await world.sdk.chat.completions.create(model="gpt-9", messages=CHAT["messages"])
    assert caught.value.code == "model_not_found"
    assert "'gpt-9'" in caught.value.message
    assert "'tiny'" in caught.value.message


async def test_a_model_that_is_not_ready_is_unavailable_with_the_reason(world: World) -> None:
    answer = await world.http.post(PATH, json={**CHAT, "model": "org/late"})
    assert answer.status_code == 503
    assert "stage 1 of 3" in error_of(answer)["message"]
    assert answer.headers["retry-after"] == "3"


async def test_a_prompt_longer_than_the_context_names_both_numbers(world: World) -> None:
    engine = world.engine(text="x")
    answer = await world.http.post("/v1/completions", json={"model": "tiny", "prompt": list(range(100)) * 6})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "600" in error["message"]
    assert "512" in error["message"]
    assert engine.requests == []


async def test_an_answer_longer_than_the_context_names_the_numbers_and_what_would_do(world: World) -> None:
    answer = await world.http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 12, "max_tokens": 501})
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert all(number in error["message"] for number in ("12", "501", "513", "512", "500"))
    world.engine(text="x")
    fits = await world.http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 12, "max_tokens": 500})
    assert fits.status_code == 200


@pytest.mark.parametrize("body", [{"prompt": [99_999]}, {"prompt": "x", "logit_bias": {"99999": 1}}])
async def test_ids_outside_the_vocabulary_are_named(world: World, body: dict[str, Any]) -> None:
    answer = await world.http.post("/v1/completions", json={"model": "tiny", **body})
    assert answer.status_code == 400
    assert "99999" in error_of(answer)["message"]


async def test_a_template_that_refuses_is_a_400(world: World) -> None:
    messages = [{"role": "user", "content": "refuse me"}]
    answer = await world.http.post(PATH, json={"model": "tiny", "messages": messages})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (Overloaded("queue full", retry_after_seconds=7), 429, {"retry-after": "7"}),
        (Unavailable("loading"), 503, {"retry-after": "2"}),
        (StageLost("stage 1 on mini2 is gone"), 503, {"retry-after": "2"}),
        (RowFailed("stage 2: out of memory"), 500, {"x-should-retry": "false"}),
        (ValueError("secret"), 500, {"x-should-retry": "false"}),
    ],
)
async def test_an_error_before_admission_is_a_real_status(
    world: World, error: Exception, status: int, headers: dict[str, str], stream: bool
) -> None:
    world.engine(Script(refuse=error))
    answer = await world.http.post(PATH, json={**CHAT, "stream": stream})
    assert answer.status_code == status
    assert headers.items() <= dict(answer.headers).items()
    assert "secret" not in answer.text
    assert error_of(answer)["type"]


async def test_one_choice_that_is_not_admitted_refuses_the_request_and_cancels_the_others(world: World) -> None:
    engine = world.engine()
    hold = asyncio.Semaphore(0)
    engine.script = lambda request: (
        Script(refuse=Overloaded("queue full"))
        if request.choice == 1
        else Script(tokens=world.tokenizer.encode("hello"), go=hold)
    )
    answer = await world.http.post(PATH, json={**CHAT, "n": 2, "stream": True})
    assert answer.status_code == 429
    assert [choice for _, choice in engine.cancelled] == [0]


async def test_an_error_after_admission_is_one_event_and_done(world: World) -> None:
    ids = world.tokenizer.encode("hello w!")
    world.engine(Script(tokens=ids, fail_after=(2, StageLost("stage 1 on mini2 is gone"))))
    answer = await world.http.post(PATH, json={**CHAT, "stream": True})
    assert answer.status_code == 200
    lines = [line.removeprefix("data: ") for line in answer.text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    error = json.loads(lines[-2])["error"]
    assert (error["code"], error["type"]) == ("stage_lost", "server_error")
    assert "mini2" in error["message"]
    contents = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines[:-2]]
    assert contents == ["", "hello", " w"]


async def test_the_sdk_raises_the_error_of_a_stream(world: World) -> None:
    world.engine(Script(fail_after=(0, StageLost("gone"))))
    stream = await world.sdk.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="gone"):
        [chunk async for chunk in stream]
    assert world.metric("stream_errors_total", code="stage_lost") >= 1


async def test_without_a_stream_an_error_after_admission_is_a_real_status(world: World) -> None:
    world.engine(Script(tokens=(5, 6), fail_after=(2, StageLost("gone"))))
    assert (await world.http.post(PATH, json=CHAT)).status_code == 503


async def test_an_unforeseen_error_in_a_stream_does_not_leak(world: World) -> None:
    world.engine(Script(tokens=(5, 6), fail_after=(1, ZeroDivisionError("secret"))))
    answer = await world.http.post(PATH, json={**CHAT, "stream": True}, headers={"x-request-id": "mine-42"})
    assert "secret" not in answer.text
    assert "mine-42" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("script", [Script(tokens=(5,), ends_early=True), Script(tokens=(5,), finish="cancelled")])
async def test_an_engine_that_stops_without_an_end_is_unavailable(world: World, script: Script) -> None:
    world.engine(script)
    assert (await world.http.post(PATH, json=CHAT)).status_code == 503


async def test_a_request_id_is_echoed_or_made(world: World) -> None:
    echoed = await world.http.get("/livez", headers={"x-request-id": "mine-42"})
    assert echoed.headers["x-request-id"] == "mine-42"
    made = await world.http.get("/nothing", headers={"x-request-id": "not ok <b>"})
    assert made.headers["x-request-id"].startswith("req_")
