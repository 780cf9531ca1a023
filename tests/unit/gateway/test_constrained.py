"""Constrained answers of the demo model through a gateway: whatever it says, it parses and validates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.demo import model_dir
from mlx_cluster.gateway.app import NodeInfo, create_app
from mlx_cluster.gateway.server import GatewayServer
from tests.fake_engine import ScriptedRoutes, served_model
from tests.runner_engine import RunnerEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[RunnerEngine]:
    made = RunnerEngine(model_dir(), 28)
    yield made
    made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(engine: RunnerEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    routes = ScriptedRoutes([served_model(model_dir(), id="demo", max_context=2048)], {"demo": engine})
    async with serving(routes) as url, openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def serving(routes: ScriptedRoutes) -> AsyncIterator[str]:
    app = create_app(routes, ApiGatewaySection(timeout=300, idle_timeout=300), NodeInfo(0, "mini1"))
    server = GatewayServer(app, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}/v1"
    finally:
        await server.stop(0)


WEATHER_ARGUMENTS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"$ref": "#/$defs/unit"},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 6}, "maxItems": 3},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
NOTE_ARGUMENTS = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 10}},
    "required": ["text"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER_ARGUMENTS, "note": NOTE_ARGUMENTS}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]


def check(calls: Any) -> None:
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


async def test_required_calls_have_valid_arguments(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model="demo",
        messages=ASK,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        n=2,
        max_tokens=160,
        seed=1,
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "tool_calls"]
    assert ended
    for choice in ended:
        check(choice.message.tool_calls)
        assert not choice.message.content


async def test_a_named_call_streams_and_adds_up(sdk: openai.AsyncOpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    async with sdk.chat.completions.stream(
        model="demo", messages=ASK, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, max_tokens=160, seed=5
    ) as stream:
        choice = (await stream.get_final_completion()).choices[0]
    assert choice.finish_reason == "tool_calls"
    check(choice.message.tool_calls)
    assert {call.function.name for call in choice.message.tool_calls or ()} == {"weather"}


async def test_several_calls_at_once(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model="demo", messages=ASK, tools=TOOLS[1:], tool_choice="required", n=2, max_tokens=200, seed=2
    )
    for choice in answer.choices:
        if choice.finish_reason == "tool_calls":
            check(choice.message.tool_calls)


async def test_formats_at_temperature_1_beside_each_other(sdk: openai.AsyncOpenAI) -> None:
    async def one(extra: Any) -> Any:
        made = await sdk.chat.completions.create(model="demo", messages=ASK, max_tokens=200, extra_body=extra)
        return made.choices[0]

    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER_ARGUMENTS}}
    bound, choice, regex, free = await asyncio.gather(
        one({"response_format": schema, "logprobs": True}),
        one({"guided_choice": ["yes", "no"]}),
        one({"guided_regex": "[0-9]{4}-[0-9]{2}"}),
        one({"max_tokens": 8}),
    )
    assert {answer.finish_reason for answer in (bound, choice, regex)} == {"stop"}
    jsonschema.validate(json.loads(bound.message.content), WEATHER_ARGUMENTS)
    assert "".join(entry.token for entry in bound.logprobs.content) == bound.message.content
    assert choice.message.content in ("yes", "no")
    assert len(regex.message.content) == 7
    assert free.message.content is not None


async def test_a_plain_prompt_is_bound_too(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="demo", prompt="x", extra_body={"guided_choice": ["left", "right"]})
    assert answer.choices[0].text in ("left", "right")
