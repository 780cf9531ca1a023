"""Reasoning in the two dialects that show it as blocks and items of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio

from mlx_cluster.tokenizer import load
from tests.fake_engine import CHAT_TEMPLATE, write_byte_level_tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

# It says <think> and </think>, so its model reasons, and shows earlier reasoning back to it.
TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}",
).replace("assistant\n{% endif %}", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}")
SAID = "<think>\nhello w</think>\n\nhello"
HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory: Path = write_byte_level_tokenizer(tmp_path_factory.mktemp("reasoning"), chat_template=TEMPLATE)
    async with running(directory, load(directory)) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=4096)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claude(world: World) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=world.url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


def prompt(world: World) -> str:
    engine: Any = world.routes.engines["tiny"]
    return "".join(world.tokenizer.token_text(token_id) for token_id in engine.requests[-1].prompt)


async def test_a_message_has_its_thinking_in_a_signed_block(world: World, claude: anthropic.AsyncAnthropic) -> None:
    world.engine(text=SAID)
    whole: Any = await claude.messages.create(model="tiny", max_tokens=99, messages=HI)
    async with claude.messages.stream(model="tiny", max_tokens=99, messages=HI) as stream:
        streamed: Any = await stream.get_final_message()
    for message in (whole, streamed):
        thinking, text = message.content
        assert (thinking.type, thinking.thinking.strip(), text.text) == ("thinking", "hello w", "hello")
        assert thinking.signature
    assert whole.content[0].signature == streamed.content[0].signature


async def test_thinking_goes_back_into_the_prompt(world: World, claude: anthropic.AsyncAnthropic) -> None:
    world.engine(text=SAID)
    first: Any = await claude.messages.create(model="tiny", max_tokens=99, messages=HI)
    history = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": "more"}]
    await claude.messages.create(model="tiny", max_tokens=99, messages=history)
    assert "hello w" in prompt(world).partition("<think>")[2].partition("</think>")[0]


@pytest.mark.parametrize(
    ("thinking", "off"), [({"type": "disabled"}, True), ({"type": "enabled", "budget_tokens": 1024}, False)]
)
async def test_thinking_can_be_switched_off(world: World, thinking: dict[str, Any], off: bool) -> None:
    world.engine(text="hello")
    body = {"model": "tiny", "max_tokens": 99, "messages": HI, "thinking": thinking}
    answer = await world.http.post("/v1/messages", json=body)
    assert answer.json()["content"] == [{"type": "text", "text": "hello"}]
    assert prompt(world).endswith("<think></think>") == off
    named = answer.headers.get("x-mlx-cluster-ignored")
    assert named == (None if off else "thinking.budget_tokens")


async def test_a_response_has_its_reasoning_in_an_item(world: World, sdk: openai.AsyncOpenAI) -> None:
    world.engine(text=SAID)
    whole: Any = await sdk.responses.create(model="tiny", input="hi")
    reasoning, message = whole.output
    assert (reasoning.type, reasoning.content[0].text.strip()) == ("reasoning", "hello w")
    assert (message.content[0].text, whole.output_text) == ("hello", "hello")
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    stream = await sdk.responses.create(model="tiny", input="hi", stream=True)
    found = [event async for event in stream]
    deltas = "".join(event.delta for event in found if event.type == "response.reasoning_text.delta")
    assert deltas == reasoning.content[0].text
    await sdk.responses.create(model="tiny", input="more", previous_response_id=whole.id)
    assert "hello w</think>" in prompt(world)


async def test_an_effort_of_none_switches_reasoning_off(world: World) -> None:
    world.engine(text="hello")
    body = {"model": "tiny", "input": "hi", "reasoning": {"effort": "none"}}
    answer = await world.http.post("/v1/responses", json=body)
    assert answer.json()["reasoning"]["effort"] == "none"
    assert prompt(world).endswith("<think></think>")
    assert "x-mlx-cluster-ignored" not in answer.headers
