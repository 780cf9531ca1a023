"""Answers in the harmony form: analysis is reasoning, final is text, what is addressed to a function is a call."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mlx_cluster import grammar
from mlx_cluster.model.grammar import Grammars
from mlx_cluster.tokenizer import load
from mlx_cluster.tokenizer.harmony import MARKS
from tests.fake_engine import write_byte_level_tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEMPLATE = (
    "{% if tools %}tools:{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>"
    "{% if message.thinking %}<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<|end|>"
    "{% endfor %}<|start|>assistant"
)
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["sky"]}}, "required": ["at"]},
    },
}
ANALYSIS = "<|channel|>analysis<|message|>hm, so<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>yes 👋"
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"at": "sky"}'
CALL_TO_FIRST = ' to=functions.look<|channel|>commentary json<|message|>{"at": "sky"}'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory: Path = write_byte_level_tokenizer(
        tmp_path_factory.mktemp("harmony"), chat_template=TEMPLATE, more_special=MARKS
    )
    async with running(directory, load(directory)) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=4096)
        yield made


async def ask(world: World, **changes: Any) -> Any:
    return await world.sdk.chat.completions.create(**{"model": "tiny", "messages": HI, **changes})


@pytest.mark.parametrize("stream", [False, True])
async def test_analysis_is_reasoning_and_final_is_text(world: World, stream: bool) -> None:
    world.engine(text=ANALYSIS + FINAL)
    if stream:
        deltas = [chunk.choices[0].delta async for chunk in await ask(world, stream=True)]
        text = "".join(delta.content or "" for delta in deltas)
        thought = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    else:
        answer = await ask(world)
        text, thought = answer.choices[0].message.content, answer.choices[0].message.reasoning_content
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert (text, thought) == ("yes 👋", "hm, so")


@pytest.mark.parametrize("call", [CALL, CALL_TO_FIRST])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_addressed_to_a_function_is_a_call(world: World, call: str, stream: bool) -> None:
    world.engine(text=ANALYSIS + call)
    if stream:
        chunks = [chunk.choices[0] async for chunk in await ask(world, tools=[TOOL], stream=True)]
        parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
        assert parts[0].function.name == "look"
        arguments = "".join(part.function.arguments or "" for part in parts)
        assert sum(bool(part.function.arguments) for part in parts) > 1
        reason = chunks[-1].finish_reason
    else:
        answer = await ask(world, tools=[TOOL])
        (found,) = answer.choices[0].message.tool_calls
        assert (found.function.name, answer.choices[0].message.content) == ("look", None)
        arguments, reason = found.function.arguments, answer.choices[0].finish_reason
    assert (json.loads(arguments), reason) == ({"at": "sky"}, "tool_calls")


async def test_a_preamble_is_text_and_words_without_a_head_are_shown(world: World) -> None:
    world.engine(text="<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL)
    answer = await ask(world, tools=[TOOL])
    assert answer.choices[0].message.content == "I look."
    assert len(answer.choices[0].message.tool_calls) == 1
    world.engine(text="no head at all")
    assert (await ask(world)).choices[0].message.content == "no head at all"


async def test_the_template_hears_of_tools_and_of_reasoning_beside_calls(world: World) -> None:
    engine = world.engine(text=FINAL)
    called = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    history = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [called], "reasoning_content": "first"},
        {"role": "tool", "tool_call_id": "c", "content": "blue"},
        {"role": "assistant", "content": "It is blue.", "reasoning_content": "second"},
        *HI,
    ]
    await ask(world, messages=history, tools=[TOOL])
    prompt = "".join(world.tokenizer.token_text(token) for token in engine.requests[0].prompt)
    assert prompt.startswith("tools:look")
    assert "first" in prompt
    assert "second" not in prompt


@pytest.mark.parametrize(
    ("changes", "good", "bad"),
    [
        ({"tools": [TOOL], "tool_choice": "required"}, CALL, CALL.replace("sky", "sea")),
        (
            {"response_format": {"type": "json_object"}},
            "<|channel|>final<|message|>{}",
            "<|channel|>final<|message|>no",
        ),
    ],
)
async def test_a_grammar_binds_the_last_message(world: World, changes: Any, good: str, bad: str) -> None:
    engine = world.engine(text=good)
    answer = await ask(world, **changes)
    assert answer.choices[0].message.tool_calls or answer.choices[0].message.content == "{}"
    bound = engine.requests[0].grammar
    assert bound is not None
    grammar.check(bound, "x")
    grammars = Grammars(Path(world.routes.served[0].model_dir), world.tokenizer.vocab_size)
    eos = tuple(world.tokenizer.eos_token_ids)
    for text, passes in ((good, True), (ANALYSIS + good, True), (bad, False), ("free text", False)):
        ids = world.tokenizer.encode(text)
        row = grammars.begin(bound, (), eos)
        allowed = []
        for token in (*ids, *eos):
            mask = row.mask()
            allowed.append(bool(mask[token // 32] >> (token % 32) & 1))
            if not allowed[-1] or token in eos:
                break
            row.consume(token)
        assert all(allowed) == passes, text
