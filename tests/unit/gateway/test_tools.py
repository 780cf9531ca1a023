"""Tools on /v1/chat/completions: what the model is told, what the client hears, with the real SDK."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.unit.gateway.conftest import World

HI: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Par}is"}}\n</tool_call>'
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def roomy(world: World) -> None:
    """A byte-level tokenizer makes long prompts of tools."""
    world.routes.served[0] = replace(world.routes.served[0], max_context=8192)


async def ask(world: World, **changes: Any) -> Any:
    return await world.sdk.chat.completions.create(
        **{"model": "tiny", "messages": HI, "tools": [WEATHER, CLOCK], **changes}
    )


def prompt_of(world: World) -> str:
    engine: Any = world.routes.engines["tiny"]
    return "".join(world.tokenizer.token_text(token) for token in engine.requests[-1].prompt)


async def test_a_call_is_a_tool_call(world: World) -> None:
    world.engine(text=f"Let me look.\n{CALL}\n{CALL}")
    choice = (await ask(world)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look.\n"
    first, second = choice.message.tool_calls
    assert first.id != second.id
    assert (first.type, first.function.name) == ("function", "weather")
    assert json.loads(first.function.arguments) == {"city": "Par}is"}


async def test_a_stream_adds_up_to_the_same(world: World) -> None:
    world.engine(text=f"Look: {CALL}\n{CALL}")
    async with world.sdk.chat.completions.stream(model="tiny", messages=HI, tools=[WEATHER]) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.content == "Look: "
    assert [call.function.name for call in message.tool_calls or ()] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in message.tool_calls or ()] == [{"city": "Par}is"}] * 2
    assert "tool_calls.function.arguments.delta" in kinds


async def test_arguments_are_streamed_as_they_come(world: World) -> None:
    world.engine(text=CALL)
    deltas = [chunk.choices[0].delta async for chunk in await ask(world, stream=True)]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (calls[0].id or "").startswith("call_")
    assert all(call.id is None and call.index == 0 for call in calls[1:])
    assert len(calls) > 5
    assert not any(delta.content for delta in deltas)


async def test_one_call_at_most_when_they_may_not_be_parallel(world: World) -> None:
    engine = world.engine(text=CALL + CALL)
    choice = (await ask(world, parallel_tool_calls=False)).choices[0]
    assert (choice.finish_reason, len(choice.message.tool_calls)) == ("tool_calls", 1)
    await engine.until(lambda: bool(engine.cancelled or engine.finished))


async def test_text_that_is_no_call_stays_text_with_its_logprobs(world: World) -> None:
    text = "see <tool_call>this</tool_call> and <tool"
    world.engine(text=text)
    choice = (await ask(world, logprobs=True)).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == text
    assert choice.message.tool_calls is None
    assert "".join(entry.token for entry in choice.logprobs.content) == text


async def test_none_tells_the_model_of_no_tools_and_reads_no_calls(world: World) -> None:
    world.engine(text=CALL)
    choice = (await ask(world, tool_choice="none")).choices[0]
    assert choice.message.content == CALL
    assert "weather" not in prompt_of(world)


async def test_a_template_without_tools_gets_an_instruction(world: World) -> None:
    world.engine(text="x")
    await ask(world, messages=[{"role": "system", "content": "be kind"}, *HI])
    prompt = prompt_of(world)
    assert prompt.startswith("<|im_start|>system\nbe kind\n\nYou may call functions")
    assert '"Tells the weather"' in prompt
    assert prompt.count("<|im_start|>system") == 1


async def test_calls_and_results_of_the_history_reach_the_model(world: World) -> None:
    world.engine(text="x")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    history: list[Any] = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await ask(world, messages=history)
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
    ) in prompt_of(world)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
            },
            {"weather"},
        ),
    ],
)
async def test_a_call_that_must_be_is_bound_by_a_grammar(world: World, choice: Any, names: set[str]) -> None:
    engine = world.engine(text=CALL)
    await ask(world, tool_choice=choice)
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert {
        name
        for name in ("weather", "clock")
        if f'\\"{name}\\"' in json.loads(grammar.source)["grammars"][0]["lark_grammar"]
    } == names


async def test_tools_that_may_be_called_bind_nothing(world: World) -> None:
    engine = world.engine(text="x")
    await ask(world)
    assert engine.requests[0].grammar is None


async def test_a_schema_that_cannot_constrain_is_refused_by_its_place(world: World) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    world.engine(text="x")
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(world, tools=[WEATHER, bad], tool_choice="required")
    assert caught.value.param == "tools[1].function.parameters"
    assert "not" in caught.value.message


# -- structured output ----------------------------------------------------------------------------------


async def test_a_schema_travels_to_the_engine(world: World) -> None:
    engine = world.engine(text="{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    format_: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    await world.sdk.chat.completions.create(model="tiny", messages=HI, response_format=format_)
    assert engine.requests[0].grammar is not None
    assert json.loads(engine.requests[0].grammar.source) == schema


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"guided_regex": "a+"}, "regex"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"guided_grammar": 'start: "a"'}, "lark"),
        ({"guided_json": {"type": "null"}}, "json_schema"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema"),
    ],
)
@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_extras_on_both_routes(world: World, extra: Any, kind: str, route: str) -> None:
    engine = world.engine(text="a")
    if route == "chat":
        await world.sdk.chat.completions.create(model="tiny", messages=HI, extra_body=extra)
    else:
        await world.sdk.completions.create(model="tiny", prompt="hi", extra_body=extra)
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert grammar.kind == kind


async def test_a_format_beside_tools_allows_either(world: World) -> None:
    engine = world.engine(text=CALL)
    choice = (await ask(world, response_format={"type": "json_object"})).choices[0]
    assert choice.finish_reason == "tool_calls"
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert "(@main | calls)" in grammar.source


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_what_cannot_be_served_is_a_400_with_its_name(world: World, extra: Any, param: str) -> None:
    world.engine(text="x")
    with pytest.raises(openai.BadRequestError) as caught:
        await world.sdk.chat.completions.create(model="tiny", messages=HI, extra_body=extra)
    assert caught.value.param == param


async def test_an_effort_that_no_template_knows_is_named(world: World) -> None:
    world.engine(text="x")
    body = {"model": "tiny", "messages": HI, "reasoning_effort": "low"}
    answer = await world.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.headers["x-mlx-cluster-ignored"]) == (200, "reasoning_effort")
