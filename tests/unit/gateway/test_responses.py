"""/v1/responses through the real OpenAI SDK, which validates strictly, a real server and a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from llguidance import LLMatcher, LLTokenizer

from mlx_cluster.errors import Overloaded, RowFailed, StageLost
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY: dict[str, Any] = {"model": "tiny", "input": "hi"}
CONTEXT = 4096
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
PATH = "/v1/responses"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    """As everywhere, with room for the instruction that tells of tools, byte by byte."""
    async with running(tokenizer_dir, tokenizer, max_body_bytes=64 * 1024, max_concurrent_requests=4) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=CONTEXT)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


async def post(world: World, **body: Any) -> Any:
    return await world.http.post(PATH, json={**BODY, **body})


async def events(world: World, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream; each is checked to be named by its own type and to have the next number."""
    answer = await post(world, stream=True, **body)
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt(world: World) -> str:
    engine: Any = world.routes.engines["tiny"]
    return "".join(world.tokenizer.token_text(token_id) for token_id in engine.requests[-1].prompt)


def turns(*pairs: str) -> str:
    """The prompt that the tiny template makes of ("role: text", ...)."""
    said = (pair.split(": ", 1) for pair in pairs)
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_a_whole_answer(world: World, sdk: openai.AsyncOpenAI) -> None:
    engine = world.engine(text="hello wörld 👋")
    answer = await sdk.responses.create(**BODY, max_output_tokens=64, metadata={"a": "b"}, instructions="be brief")
    assert answer.output_text == "hello wörld 👋"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.model, answer.metadata, answer.instructions) == ("tiny", {"a": "b"}, "be brief")
    assert prompt(world) == turns("system: be brief", "user: hi")
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(engine.requests[0].prompt)
    assert answer.usage.output_tokens == engine.num_emitted
    assert engine.requests[0].max_tokens == 64
    assert answer.output[0].type == "message"
    assert answer.output[0].status == "completed"


async def test_a_stream_has_the_events_of_the_dialect_in_order(world: World) -> None:
    world.engine(text="hello w")
    found = await events(world)
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert found[2]["item"]["content"] == []
    assert found[6]["text"] == "hello w"
    assert found[8]["item"] == found[9]["response"]["output"][0]
    assert len({event["item_id"] for event in found[3:8]}) == 1


async def test_the_sdk_accumulates_a_stream(world: World, sdk: openai.AsyncOpenAI) -> None:
    world.engine(text="hello w👋!")
    async with sdk.responses.stream(**BODY) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert deltas == ["hello", " w", "👋", "!"]
    assert final.output_text == "hello w👋!"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_limit_makes_an_incomplete_response(world: World, stream: bool) -> None:
    world.engine(text="hello hello")
    if stream:
        last = (await events(world, max_output_tokens=1))[-1]
        assert last["type"] == "response.incomplete"
        response = last["response"]
    else:
        response = (await post(world, max_output_tokens=1)).json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], response["output"][0]["content"][0]["text"]) == ("incomplete", "hello")


@pytest.mark.parametrize("asked", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
async def test_log_probabilities(world: World, sdk: openai.AsyncOpenAI, asked: Any) -> None:
    engine = world.engine(text="hello w")
    answer: Any = await sdk.responses.create(**BODY, **asked)
    logprobs = answer.output[0].content[0].logprobs
    assert [entry.token for entry in logprobs[:2]] == ["hello", " w"]
    assert engine.requests[0].sampling.top_logprobs == asked.get("top_logprobs", 0)
    assert len(logprobs[0].top_logprobs) == asked.get("top_logprobs", 0)
    deltas = [event for event in await events(world, **asked) if event["type"] == "response.output_text.delta"]
    assert [delta["logprobs"][0]["token"] for delta in deltas][:2] == ["hello", " w"]


async def test_items_of_a_history(world: World) -> None:
    world.engine(text="x")
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "look"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "calling", "annotations": []}], "id": "m"},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}", "id": "fc_1"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "x"},
        {"type": "function_call_output", "call_id": "c1", "output": "blue"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
        {"role": "user", "content": "and?"},
    ]
    assert (await post(world, input=items, instructions="be brief")).status_code == 200
    assert prompt(world) == turns(
        "system: be brief\n\nbe kind",
        "user: look",
        'assistant: calling\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
        '\n<tool_call>\n{"name": "patch", "arguments": {"input": "x"}}\n</tool_call>',
        "user: <tool_response>\nblue\n</tool_response>\n<tool_response>\ndone\n</tool_response>\nand?",
    )


async def test_a_tool_is_called_and_its_result_goes_back(world: World, sdk: openai.AsyncOpenAI) -> None:
    world.engine(text=f"hello {CALL}")
    answer: Any = await sdk.responses.create(**BODY, tools=[TOOL])
    message, call = answer.output
    assert (message.type, call.type, call.name, call.status) == ("message", "function_call", "look", "completed")
    assert json.loads(call.arguments) == {"at": "sky"}
    assert answer.tools[0].name == "look"
    world.engine(text="x")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "blue"}]
    await sdk.responses.create(model="tiny", input=result, previous_response_id=answer.id)
    assert "<tool_call>" in prompt(world)
    assert "blue" in prompt(world)


def lets_through(source: str, text: str) -> bool:
    """Whether a grammar takes this whole text."""
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0)
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


async def test_the_events_of_a_call(world: World, sdk: openai.AsyncOpenAI) -> None:
    world.engine(text=f"{CALL}\n{CALL}")
    found = [event for event in await events(world, tools=[TOOL]) if event.get("output_index") == 1]
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[0] == "output_item.added"
    assert kinds[-2:] == ["function_call_arguments.done", "output_item.done"]
    assert set(kinds[1:-2]) == {"function_call_arguments.delta"}
    assert json.loads("".join(event["delta"] for event in found[1:-2])) == {"at": "sky"}
    async with sdk.responses.stream(**BODY, tools=[TOOL]) as stream:
        final: Any = await stream.get_final_response()
    assert [json.loads(call.arguments) for call in final.output] == [{"at": "sky"}] * 2


async def test_a_custom_tool_gets_plain_text(world: World, sdk: openai.AsyncOpenAI) -> None:
    engine = world.engine(text='hi <tool_call>\n{"name": "patch"}\n*** Begin\nx\n</tool_call>')
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin\\n" ("x" | "y")'}
    custom: Any = {"type": "custom", "name": "patch", "description": "patches", "format": grammar}
    answer: Any = await sdk.responses.create(**BODY, tools=[custom])
    assert [item.type for item in answer.output] == ["message", "custom_tool_call"]
    assert answer.output[1].input == "*** Begin\nx"
    found = await events(world, tools=[custom])
    done = next(event for event in found if event["type"] == "response.custom_tool_call_input.done")
    assert done["input"] == "*** Begin\nx"
    assert "x-mlx-cluster-ignored" not in (await post(world, tools=[custom])).headers
    bound = engine.requests[0].grammar
    assert bound is not None
    assert lets_through(bound.source, "no call, with a < and a {")
    assert lets_through(bound.source, 'so: <tool_call>\n{"name": "patch"}\n*** Begin\ny\n</tool_call>')
    assert not lets_through(bound.source, '<tool_call>\n{"name": "patch"}\n*** Begin\nz\n</tool_call>')
    assert not lets_through(bound.source, '<tool_call>\n{"name": "patch", "arguments": {}}\n</tool_call>')


async def test_a_custom_tool_may_be_insisted_on(world: World) -> None:
    engine = world.engine(text='<tool_call>\n{"name": "patch"}\nabc\n</tool_call>')
    custom = {
        "type": "custom",
        "name": "patch",
        "format": {"type": "grammar", "syntax": "regex", "definition": "[abc]+"},
    }
    choice = {"type": "custom", "name": "patch"}
    body = (await post(world, tools=[custom, TOOL], tool_choice=choice)).json()
    assert [(item["type"], item["input"]) for item in body["output"]] == [("custom_tool_call", "abc")]
    bound = engine.requests[0].grammar
    assert bound is not None
    assert lets_through(bound.source, '<tool_call>\n{"name": "patch"}\ncab\n</tool_call>')
    assert not lets_through(bound.source, "no call")


async def test_a_grammar_that_is_none_is_refused_by_its_field(world: World) -> None:
    custom = {
        "type": "custom",
        "name": "patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: ("},
    }
    error = (await post(world, tools=[custom])).json()["error"]
    assert (error["param"], error["code"]) == ("tools[0].format.definition", "invalid_grammar")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "name": "look"}, {"type": "allowed_tools", "mode": "required"}]
)
async def test_a_call_that_is_insisted_on_is_constrained(world: World, choice: Any) -> None:
    engine = world.engine(text=CALL)
    if choice == {"type": "allowed_tools", "mode": "required"}:
        choice = {**choice, "tools": [{"type": "function", "name": "look"}]}
    other = {**TOOL, "name": "other"}
    assert (await post(world, tools=[other, TOOL], tool_choice=choice)).status_code == 200
    assert engine.requests[0].grammar is not None
    assert ("other" in engine.requests[0].grammar.source) == (choice == "required")


@pytest.mark.parametrize(
    "format_", [{"type": "json_object"}, {"type": "json_schema", "name": "x", "schema": TOOL["parameters"]}]
)
async def test_an_answer_in_a_schema_is_constrained(world: World, sdk: openai.AsyncOpenAI, format_: Any) -> None:
    engine = world.engine(text='{"at": "sky"}')
    answer = await sdk.responses.create(**BODY, text={"format": format_})
    assert engine.requests[0].grammar is not None
    assert json.loads(answer.output_text) == {"at": "sky"}
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == format_["type"]


async def test_a_conversation_goes_on_by_the_id_of_the_last_response(world: World, sdk: openai.AsyncOpenAI) -> None:
    world.engine(text="hello")
    first = await sdk.responses.create(**BODY, instructions="only now")
    second = await sdk.responses.create(model="tiny", input="more", previous_response_id=first.id)
    assert prompt(world) == turns("user: hi", "assistant: hello", "user: more")  # instructions are of one turn
    stream = await sdk.responses.create(model="tiny", input="last", previous_response_id=second.id, stream=True)
    third = [event async for event in stream][-1]
    assert third.type == "response.completed"
    assert prompt(world) == turns("user: hi", "assistant: hello", "user: more", "assistant: hello", "user: last")
    assert (await sdk.responses.retrieve(third.response.id)).output_text == "hello"


async def test_retrieve_list_the_input_and_delete(world: World, sdk: openai.AsyncOpenAI) -> None:
    world.engine(text="hello")
    made = await sdk.responses.create(model="tiny", input=[{"role": "user", "content": c} for c in ("a", "b", "c")])
    assert (await sdk.responses.retrieve(made.id)).model_dump() == made.model_dump()
    first = await sdk.responses.input_items.list(made.id, order="asc", limit=2)
    items: list[Any] = [item async for item in first]
    assert [item.content[0].text for item in items] == ["a", "b", "c"]
    await sdk.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made.id)
    assert error_of(await world.http.delete(f"{PATH}/{made.id}"), 404)["code"] == "response_not_found"
    for query in ("limit=0", "limit=x", "order=up", "after=nobody"):
        kept = (await post(world)).json()["id"]
        error_of(await world.http.get(f"{PATH}/{kept}/input_items?{query}"), 400)


async def test_what_is_not_stored_cannot_be_found(world: World) -> None:
    world.engine(text="hello")
    made = (await post(world, store=False)).json()["id"]
    error_of(await world.http.get(f"{PATH}/{made}"), 404)
    error = error_of(await post(world, previous_response_id=made), 400)
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


async def test_an_id_names_the_node_that_keeps_its_response(world: World) -> None:
    foreign = f"resp_7_{'0' * 48}"
    assert "there is no response" in error_of(await world.http.get(f"{PATH}/{foreign}"), 404)["message"]
    assert "there is no response" in error_of(await post(world, previous_response_id=foreign), 400)["message"]


async def finished(world: World, id_: str) -> dict[str, Any]:
    """A background response once it is done. Polled as clients do, but with no pause: the loop runs the work."""
    async with asyncio.timeout(20):
        while (found := (await world.http.get(f"{PATH}/{id_}")).json())["status"] in ("queued", "in_progress"):
            pass
    return found


async def test_a_background_response_is_answered_at_once_and_found_later(world: World, sdk: openai.AsyncOpenAI) -> None:
    go = asyncio.Semaphore(0)
    engine = world.engine(Script(tokens=world.tokenizer.encode("hello"), go=go))
    queued = await sdk.responses.create(**BODY, background=True)
    assert (queued.status, queued.output) == ("queued", [])
    await engine.until(lambda: len(engine.requests) == 1)
    assert (await sdk.responses.retrieve(queued.id)).status == "in_progress"
    error = error_of(await post(world, previous_response_id=queued.id), 400)
    assert "in_progress" in error["message"]
    go.release()
    found = await finished(world, queued.id)
    assert found["output"][0]["content"][0]["text"] == "hello"
    assert found["created_at"] == queued.created_at
    assert world.app.state.gateway.in_flight == 0


async def test_a_background_response_can_be_cancelled_twice(world: World, sdk: openai.AsyncOpenAI) -> None:
    engine = world.engine(Script(tokens=(5,), go=asyncio.Semaphore(0)))
    queued = await sdk.responses.create(**BODY, background=True)
    await engine.until(lambda: len(engine.requests) == 1)
    assert (await sdk.responses.cancel(queued.id)).status == "cancelled"
    assert len(engine.cancelled) == 1
    assert world.app.state.gateway.in_flight == 0
    assert (await sdk.responses.cancel(queued.id)).status == "cancelled"
    assert (await sdk.responses.retrieve(queued.id)).status == "cancelled"


async def test_a_background_response_that_is_deleted_ends(world: World, sdk: openai.AsyncOpenAI) -> None:
    engine = world.engine(Script(tokens=(5,), go=asyncio.Semaphore(0)))
    queued = await sdk.responses.create(**BODY, background=True)
    await engine.until(lambda: len(engine.requests) == 1)
    await sdk.responses.delete(queued.id)
    assert len(engine.cancelled) == 1
    assert (await world.http.get(f"{PATH}/{queued.id}")).status_code == 404


async def test_only_background_responses_can_be_cancelled(world: World) -> None:
    world.engine(text="hello")
    made = (await post(world)).json()["id"]
    error_of(await world.http.post(f"{PATH}/{made}/cancel"), 400)
    error_of(await world.http.post(f"{PATH}/resp_0_x/cancel"), 404)


async def test_a_background_response_fails_with_a_reason(world: World) -> None:
    world.engine(Script(refuse=Overloaded("queue full")))
    found = await finished(world, (await post(world, background=True)).json()["id"])
    assert (found["status"], found["error"]) == (
        "failed",
        {"code": "rate_limit_exceeded", "message": "queue full"},
    )


async def test_background_work_takes_a_place(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, max_concurrent_requests=1) as world:
        world.engine(Script(tokens=(5,), go=asyncio.Semaphore(0)))
        made = (await post(world, background=True)).json()["id"]
        error_of(await post(world, background=True), 429)
        error_of(await post(world), 429)
        await world.http.post(f"{PATH}/{made}/cancel")
        world.engine(text="hello")
        assert (await post(world)).status_code == 200


async def test_what_is_dropped_is_named(world: World) -> None:
    world.engine(text="x")
    answer = await post(
        world,
        reasoning={"effort": "high", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        text={"verbosity": "low", "format": {"type": "text"}},
        prompt_cache_key="k",
        client_metadata={"a": "b"},
        tools=[{"type": "web_search", "search_context_size": "low"}],
        tool_choice="auto",
        truncation="disabled",
    )
    assert answer.status_code == 200
    assert set(answer.headers["x-mlx-cluster-ignored"].split(", ")) == {
        "reasoning.effort",
        "reasoning.summary",
        "tools[web_search]",
        "include[reasoning.encrypted_content]",
        "text.verbosity",
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0]"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ({"input": [5]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 9999}, "max_output_tokens"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "text.format"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "else"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"previous_response_id": ""}, "previous_response_id"),
        ({"bogus": 1}, "bogus"),
    ],
)
async def test_bad_bodies_name_the_field(world: World, changes: dict[str, Any], named: str) -> None:
    error = error_of(await post(world, **changes), 400)
    assert str(error["param"]).startswith(named), error


async def test_a_stored_response_is_not_streamed_again(world: World) -> None:
    world.engine(text="x")
    made = (await post(world)).json()["id"]
    assert error_of(await world.http.get(f"{PATH}/{made}?stream=true"), 400)["param"] == "stream"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status"), [(Overloaded("full"), 429), (StageLost("gone"), 503)])
async def test_an_error_before_admission_is_a_real_status(
    world: World, error: Exception, status: int, stream: bool
) -> None:
    world.engine(Script(refuse=error))
    error_of(await post(world, stream=stream), status)


@pytest.mark.parametrize("error", [StageLost("stage 1 is gone"), RowFailed("stage 1 is gone: out of memory")])
async def test_an_error_after_admission_is_a_failed_response_and_the_end(world: World, error: Exception) -> None:
    world.engine(Script(tokens=world.tokenizer.encode("hello w"), fail_after=(1, error)))
    last = (await events(world))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "stage 1 is gone" in last["response"]["error"]["message"]
    kept = (await world.http.get(f"{PATH}/{last['response']['id']}")).json()
    assert (kept["status"], kept["output"][0]["status"]) == ("failed", "incomplete")


async def test_a_waiting_stream_sends_events_that_clients_count(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, keepalive_seconds=0.02) as world:
        go = asyncio.Semaphore(0)
        world.engine(Script(tokens=tokenizer.encode("hello"), go=go))
        async with (
            asyncio.timeout(20),
            world.http.stream("POST", PATH, json={**BODY, "stream": True}) as answer,
        ):
            signs = 0
            names = []
            async for line in answer.aiter_lines():
                names += [line] if line.startswith("event: ") else []
                signs += line == "event: response.in_progress"
                if signs == 3:
                    go.release()
            assert signs >= 3
            assert names[-1].startswith("event: response.")
            assert names[-1] != "event: response.in_progress"
