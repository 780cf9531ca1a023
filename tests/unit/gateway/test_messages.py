"""/v1/messages through the real Anthropic SDK, which validates strictly, a real server and a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import pytest_asyncio

from mlx_cluster.errors import Overloaded, RowFailed, StageLost, Unavailable
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI: list[Any] = [{"role": "user", "content": "hi"}]
CONTEXT = 4096
TOOL: dict[str, Any] = {
    "name": "look",
    "description": "looks",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 256, "messages": HI}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    """As everywhere, with room for the instruction that tells of tools, byte by byte."""
    async with running(tokenizer_dir, tokenizer, max_body_bytes=64 * 1024, max_concurrent_requests=4) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=CONTEXT)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(world: World) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=world.url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


async def post(world: World, path: str = "/v1/messages", headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await world.http.post(path, json={**BODY, **body}, headers=headers)


async def events(world: World, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream; each is checked to be named by its own type."""
    answer = await post(world, stream=True, **body)
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def error_of(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    return str(body["error"]["message"])


def prompt(world: World) -> str:
    """What the engine behind "tiny" was asked, as text."""
    engine: Any = world.routes.engines["tiny"]
    return "".join(world.tokenizer.token_text(token_id) for token_id in engine.requests[-1].prompt)


async def test_a_whole_answer(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    engine = world.engine(text="hello wörld 👋")
    answer = await sdk.messages.create(**BODY)
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "hello wörld 👋"
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "tiny",
        "end_turn",
        None,
    )
    assert answer.id.startswith("msg_")
    assert answer._request_id
    request = engine.requests[0]
    assert request.prompt == world.tokenizer.render_chat(HI)
    assert request.max_tokens == 256
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(request.prompt), engine.num_emitted)


async def test_the_sdk_accumulates_a_stream(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    engine = world.engine(text="hello w👋!")
    async with sdk.messages.stream(**BODY) as stream:
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert texts == ["hello", " w", "👋", "!"]
    assert message.content[0].text == "hello w👋!"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == engine.num_emitted


async def test_a_stream_has_the_events_of_the_dialect_in_order(world: World) -> None:
    world.engine(text="hello w")
    found = await events(world)
    assert [event["type"] for event in found] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert found[0]["message"]["content"] == []
    assert found[0]["message"]["usage"]["input_tokens"] > 0
    assert found[2]["content_block"] == {"type": "text", "text": ""}
    assert found[3]["delta"] == {"type": "text_delta", "text": "hello"}
    assert found[6]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


async def test_an_answer_without_text_has_no_block(world: World) -> None:
    world.engine(text="")
    assert [event["type"] for event in await events(world)] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]
    assert (await post(world)).json()["content"] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_which_stop_sequence_ended_the_answer(world: World, stream: bool) -> None:
    world.engine(text="hello STOP more")
    body: dict[str, Any] = {"stop_sequences": ["never", "STOP"]}
    if stream:
        found = await events(world, **body)
        end, text = found[-2]["delta"], found[3]["delta"]["text"] + found[4]["delta"]["text"]
    else:
        end = (await post(world, **body)).json()
        text = end["content"][0]["text"]
    assert (text, end["stop_reason"], end["stop_sequence"]) == ("hello ", "stop_sequence", "STOP")


async def test_the_limit_ends_with_max_tokens(world: World) -> None:
    engine = world.engine(text="hello hello")
    answer = (await post(world, max_tokens=2)).json()
    assert (answer["content"][0]["text"], answer["stop_reason"]) == ("hello ", "max_tokens")
    assert engine.requests[0].max_tokens == 2


async def test_max_tokens_beyond_the_context_gives_what_is_left_and_says_so(world: World) -> None:
    engine = world.engine(Script(tokens=world.tokenizer.encode("a") * CONTEXT))
    answer = (await post(world, max_tokens=32_000)).json()
    left = CONTEXT - len(engine.requests[0].prompt)
    assert engine.requests[0].max_tokens == left
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["output_tokens"] == left


async def test_cached_tokens_are_counted_beside_the_others(world: World) -> None:
    script = Script(tokens=(5,), cached_tokens=4)
    world.engine(script)
    usage = (await post(world)).json()["usage"]
    whole = len(world.tokenizer.render_chat(HI))
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (whole - 4, 4)
    started = (await events(world))[0]["message"]["usage"]
    assert (started["input_tokens"], started["cache_read_input_tokens"]) == (whole - 4, 4)


async def test_sampling_reaches_the_engine(world: World) -> None:
    engine = world.engine(text="x")
    await post(world, temperature=0.5, top_p=0.9, top_k=7)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)


@pytest.mark.parametrize(
    "system",
    [
        "be brief",
        [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=1a2b3;\nbe brief",
        [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "be brief"}],
    ],
)
async def test_a_system_prompt_without_its_line_of_accounting(world: World, system: Any) -> None:
    world.engine(text="x")
    assert (await post(world, system=system)).status_code == 200
    assert prompt(world).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


async def test_a_history_with_tools_and_thinking(world: World) -> None:
    world.engine(text="x")
    history = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "zzz"},
                {"type": "text", "text": "calling"},
                {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "sky"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "blue"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "gone", "is_error": True},
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    assert (await post(world, messages=history)).status_code == 200
    assert prompt(world) == (
        "<|im_start|>user\none\n\ntwo<|im_end|>\n"
        '<|im_start|>assistant\ncalling\n<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nblue\n</tool_response>\n<tool_response>\nError: gone\n</tool_response>\n"
        "and now?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hello"}]])
async def test_an_answer_is_continued(world: World, sdk: anthropic.AsyncAnthropic, content: Any) -> None:
    world.engine(text=" w")
    answer = await sdk.messages.create(**{**BODY, "messages": [*HI, {"role": "assistant", "content": content}]})
    assert prompt(world) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
    assert answer.content[0].text == " w"


async def test_a_schema_that_cannot_be_followed_is_named_as_the_client_wrote_it(world: World) -> None:
    tools = [{"type": "bash_20250124", "name": "bash"}, {"name": "bad", "input_schema": {"properties": 5}}]
    answer = await post(world, tools=tools, tool_choice={"type": "any"})
    assert "tools[1].input_schema" in error_of(answer, 400, "invalid_request_error")


async def test_a_tool_is_called(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    world.engine(text=f"hello {CALL}")
    answer = await sdk.messages.create(**BODY, tools=[TOOL])
    assert [block.type for block in answer.content] == ["text", "tool_use"]
    call: Any = answer.content[1]
    assert (call.name, call.input, answer.stop_reason) == ("look", {"at": "sky"}, "tool_use")
    assert '"look"' in prompt(world)


async def test_the_sdk_accumulates_two_calls(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    world.engine(text=f"{CALL}\n{CALL}")
    async with sdk.messages.stream(**BODY, tools=[TOOL]) as stream:
        message = await stream.get_final_message()
    calls: list[Any] = message.content
    assert [(call.type, call.name, call.input) for call in calls] == [("tool_use", "look", {"at": "sky"})] * 2
    assert len({call.id for call in calls}) == 2
    assert message.stop_reason == "tool_use"


async def test_the_events_of_a_call(world: World) -> None:
    world.engine(text=CALL)
    found = await events(world, tools=[TOOL])
    blocks = [event for event in found if event["type"].startswith("content_block")]
    assert (blocks[0]["type"], blocks[0]["content_block"]["input"]) == ("content_block_start", {})
    assert blocks[-1]["type"] == "content_block_stop"
    assert json.loads("".join(block["delta"]["partial_json"] for block in blocks[1:-1])) == {"at": "sky"}


async def test_a_call_that_the_limit_cuts_off_is_shown_as_far_as_it_came(world: World) -> None:
    ids = world.tokenizer.encode(CALL)[:-20]
    world.engine(Script(tokens=ids))
    answer = (await post(world, tools=[TOOL], max_tokens=len(ids))).json()
    assert answer["stop_reason"] == "max_tokens"
    assert all(block["type"] in ("text", "tool_use") for block in answer["content"])


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look"}])
async def test_a_call_that_is_insisted_on_is_constrained(world: World, choice: dict[str, Any]) -> None:
    engine = world.engine(text=CALL)
    await post(world, tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    assert engine.requests[0].grammar is not None
    assert "look" in engine.requests[0].grammar.source


async def test_no_tool_is_told_of_when_none_may_be_called(world: World) -> None:
    engine = world.engine(text=CALL)
    answer = (await post(world, tools=[TOOL], tool_choice={"type": "none"})).json()
    assert engine.requests[0].prompt == world.tokenizer.render_chat(HI)
    assert answer["content"] == [{"type": "text", "text": CALL}]


async def test_hosted_tools_are_dropped_and_named(world: World) -> None:
    world.engine(text="x")
    hosted = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]
    answer = await post(world, tools=[{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}}, *hosted])
    assert answer.headers["x-mlx-cluster-ignored"] == "tools[web_search_20250305]"
    assert (await post(world, tools=hosted)).status_code == 200


async def test_tools_count(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    without = await sdk.messages.count_tokens(model="tiny", messages=HI)
    with_tools = await sdk.messages.count_tokens(model="tiny", messages=HI, tools=[TOOL])
    assert with_tools.input_tokens > without.input_tokens


async def test_an_answer_in_a_schema_is_constrained(world: World) -> None:
    engine = world.engine(text='{"at": "sky"}')
    await post(world, output_config={"format": {"type": "json_schema", "schema": TOOL["input_schema"]}})
    assert engine.requests[0].grammar is not None
    bad = {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}
    assert "output_config.format" in error_of(await post(world, output_config=bad), 400, "invalid_request_error")


async def test_turns_of_the_user_in_a_row_are_one(world: World) -> None:
    world.engine(text="x")
    await post(world, messages=[*HI, *HI])
    assert prompt(world).count("<|im_start|>user") == 1


async def test_counting_needs_no_max_tokens_and_no_engine(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    world.engine(Script(refuse=Unavailable("loading")))
    counted = await sdk.messages.count_tokens(model="tiny", messages=HI, system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert counted.input_tokens == len(world.tokenizer.render_chat([system, *HI]))
    beta = await sdk.beta.messages.count_tokens(model="tiny", messages=HI)
    assert beta.input_tokens == len(world.tokenizer.render_chat(HI))


async def test_a_line_of_accounting_changes_no_count(world: World) -> None:
    counts = {
        (
            await world.http.post(
                "/v1/messages/count_tokens", json={"model": "tiny", "messages": HI, "system": f"{line}be brief"}
            )
        ).json()["input_tokens"]
        for line in ("", "x-anthropic-billing-header: cch=1;\n", "x-anthropic-billing-header: cch=22222;\n")
    }
    assert len(counts) == 1


@pytest.mark.parametrize("headers", [{"x-api-key": "k"}, {"authorization": "Bearer k"}, {}])
async def test_both_header_styles_are_taken(world: World, headers: dict[str, str]) -> None:
    world.engine(text="x")
    answer = await post(world, "/v1/messages?beta=true", {**headers, "anthropic-version": "2023-06-01"})
    assert answer.status_code == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert "x-mlx-cluster-ignored" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_dropped_is_named(world: World, stream: bool) -> None:
    world.engine(text="x")
    answer = await post(
        world,
        headers={
            "anthropic-beta": "claude-code-20250219,time-travel-2099-01-01, interleaved-thinking-2025-05-14,b\tad"
        },
        stream=stream,
        thinking={"type": "enabled", "budget_tokens": 2048},
        mcp_servers=[{"type": "url", "url": "https://example.com", "name": "x"}],
        output_config={"effort": "high"},
        metadata={"user_id": "u"},
        cache_control={"type": "ephemeral"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    assert answer.status_code == 200
    assert set(answer.headers["x-mlx-cluster-ignored"].split(", ")) == {
        "thinking",
        "mcp_servers",
        "output_config.effort",
        "thinking.budget_tokens",
        "b_ad",
        "time-travel-2099-01-01",
        "interleaved-thinking-2025-05-14",
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": None}, "max_tokens is required"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "9"}, 'max_tokens is "9"'),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "content": "I "}]}, "ends with whitespace"),
        ({"messages": [*HI, {"role": "assistant", "content": ""}]}, "not text alone"),
        ({"system": 5}, "system"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "two tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "else"}}, "tool_choice.name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"output_format": {"type": "json_schema", "schema": {}}}, "output_format"),
        ({"bogus": 1}, "bogus"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_bad_bodies_are_invalid_requests_that_name_the_field(
    world: World, changes: dict[str, Any], named: str, path: str
) -> None:
    if named in ("max_tokens is required", "ends with whitespace", "not text alone") and path.endswith("count_tokens"):
        assert (await post(world, path, **changes)).status_code == 200
        return
    assert named in error_of(await post(world, path, **changes), 400, "invalid_request_error")


@pytest.mark.parametrize(
    ("content", "content_type", "status", "kind"),
    [
        (b"{oops", "application/json", 400, "invalid_request_error"),
        (b"[]", "application/json", 400, "invalid_request_error"),
        (b"{}", "text/plain", 415, "invalid_request_error"),
        (b" " * 70_000, "application/json", 413, "request_too_large"),
    ],
)
async def test_bodies_that_cannot_be_read(
    world: World, content: bytes, content_type: str, status: int, kind: str
) -> None:
    answer = await world.http.post("/v1/messages", content=content, headers={"content-type": content_type})
    error_of(answer, status, kind)


async def test_routes_methods_and_models_that_do_not_exist(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    error_of(await world.http.get("/v1/messages"), 405, "invalid_request_error")
    error_of(await world.http.post("/v1/messages/batches", json={}), 404, "not_found_error")
    error_of(await world.http.get("/v1/nothing", headers={"anthropic-version": "2023-06-01"}), 404, "not_found_error")
    with pytest.raises(anthropic.NotFoundError) as caught:
        await sdk.messages.create(**{**BODY, "model": "claude-9"})
    assert "'claude-9'" in str(caught.value.body)
    assert caught.value.response.headers["request-id"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (Overloaded("queue full", retry_after_seconds=7), 429, "rate_limit_error", {"retry-after": "7"}),
        (Unavailable("loading"), 529, "overloaded_error", {"retry-after": "2"}),
        (StageLost("stage 1 on mini2 is gone"), 529, "overloaded_error", {"retry-after": "2"}),
        (RowFailed("stage 2: out of memory"), 500, "api_error", {"x-should-retry": "false"}),
        (ValueError("secret"), 500, "api_error", {"x-should-retry": "false"}),
    ],
)
async def test_an_error_before_admission_is_a_real_status(
    world: World, error: Exception, status: int, kind: str, headers: dict[str, str], stream: bool
) -> None:
    world.engine(Script(refuse=error))
    answer = await post(world, stream=stream)
    assert "secret" not in error_of(answer, status, kind)
    assert headers.items() <= dict(answer.headers).items()


async def test_a_model_that_is_not_ready_is_overloaded(world: World) -> None:
    assert "stage 1 of 3" in error_of(await post(world, model="org/late"), 529, "overloaded_error")


async def test_an_error_after_admission_is_one_event_and_the_end(world: World) -> None:
    world.engine(Script(tokens=world.tokenizer.encode("hello w"), fail_after=(1, StageLost("stage 1 is gone"))))
    found = await events(world)
    assert [event["type"] for event in found][-2:] == ["content_block_delta", "error"]
    assert found[-1]["error"]["type"] == "overloaded_error"
    assert found[-1]["error"]["message"].startswith("stage 1 is gone; not resumed within")


async def test_the_sdk_raises_the_error_of_a_stream(world: World, sdk: anthropic.AsyncAnthropic) -> None:
    world.engine(Script(fail_after=(0, StageLost("stage 1 is gone"))))
    stream = await sdk.messages.create(**BODY, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="gone"):
        [event async for event in stream]


async def test_a_waiting_stream_pings(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, keepalive_seconds=0.02) as world:
        go = asyncio.Semaphore(0)
        world.engine(Script(tokens=tokenizer.encode("hello"), go=go))
        async with (
            asyncio.timeout(20),
            world.http.stream("POST", "/v1/messages", json={**BODY, "stream": True}) as answer,
        ):
            pings = 0
            async for line in answer.aiter_lines():
                pings += line == "event: ping"
                if pings == 3:
                    go.release()
            assert pings >= 3
            assert line == "" or "message_stop" in line
