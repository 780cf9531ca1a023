"""Reasoning on /v1/chat/completions: apart from the text, in both names, counted, with tools and grammars after it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mlx_cluster import grammar
from mlx_cluster.tokenizer import Tokenizer, load
from tests.fake_engine import CHAT_TEMPLATE, Script, write_byte_level_tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "f"}}
# Opens the reasoning unless told not to, and shows what was thought before.
TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think></think>{% else %}<think>\n{% endif %}{% endif %}",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory: Path = write_byte_level_tokenizer(tmp_path_factory.mktemp("reasoning"), chat_template=TEMPLATE)
    async with running(directory, load(directory)) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=4096)
        yield made


async def ask(world: World, **changes: Any) -> Any:
    return await world.sdk.chat.completions.create(**{"model": "tiny", "messages": HI, **changes})


def prompt_of(world: World) -> str:
    engine: Any = world.routes.engines["tiny"]
    return "".join(world.tokenizer.token_text(token) for token in engine.requests[-1].prompt)


async def test_reasoning_is_apart_and_counted(world: World) -> None:
    world.engine(text="hm, so\n</think>\n\nyes")
    answer = await ask(world)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("yes", "hm, so\n", "hm, so\n")
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("hm, so\n</think>")


async def test_a_stream_tells_the_same(world: World) -> None:
    world.engine(text="hm</think>yes")
    options = {"include_usage": True}
    chunks = [chunk async for chunk in await ask(world, stream=True, stream_options=options)]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "yes"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == len("hm</think>")


async def test_an_answer_that_ends_while_thinking_has_no_text(world: World) -> None:
    world.engine(Script(tokens=world.tokenizer.encode("hm, well")))
    choice = (await ask(world)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("length", "")
    assert choice.message.reasoning == "hm, well"


async def test_a_call_after_reasoning(world: World) -> None:
    world.engine(text='hm</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    choice = (await ask(world, tools=[TOOL])).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning) == (None, "hm")
    assert choice.message.tool_calls[0].function.arguments == "{}"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_reasoning_of_the_history_comes_back(world: World, name: str) -> None:
    world.engine(text="x")
    await ask(world, messages=[*HI, {"role": "assistant", "content": "yes", name: "I thought"}, *HI])
    assert "<|im_start|>assistant\n<think>I thought</think>yes<|im_end|>" in prompt_of(world)


@pytest.mark.parametrize(
    "changes", [{"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}]
)
async def test_thinking_can_be_switched_off_where_the_template_knows_how(world: World, changes: Any) -> None:
    world.engine(text="yes")
    answer = await ask(world, **changes)
    assert answer.choices[0].message.content == "yes"
    assert prompt_of(world).endswith("<think></think>")


async def test_an_effort_that_the_template_knows_is_not_named(world: World) -> None:
    body = {"model": "tiny", "messages": HI, "reasoning_effort": "low"}
    world.engine(text="x</think>y")
    assert "x-mlx-cluster-ignored" not in (await world.http.post("/v1/chat/completions", json=body)).headers


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("bound", ["format", "call"])
async def test_a_grammar_lets_the_model_think_first(world: World, opened: bool, bound: str) -> None:
    engine = world.engine(text="x")
    changes: Any = (
        {"response_format": {"type": "json_object"}}
        if bound == "format"
        else {"tools": [TOOL], "tool_choice": "required"}
    )
    if not opened:
        changes["reasoning_effort"] = "none"
    await ask(world, **changes)
    made = engine.requests[0].grammar
    assert made is not None
    grammar.check(made, "x")
    start = json.loads(made.source)["grammars"][0]["lark_grammar"].splitlines()[0]
    assert start.startswith("start: before " if opened else "start: before? ")


async def test_markers_that_are_special_tokens_are_shown(tmp_path: Path) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    directory = write_byte_level_tokenizer(tmp_path / "special")
    inner = Fast.from_file(str(directory / "tokenizer.json"))
    inner.add_special_tokens([AddedToken("[THINK]", special=True), AddedToken("[/THINK]", special=True)])
    inner.save(str(directory / "tokenizer.json"))
    tokenizer: Tokenizer = load(directory)
    assert tokenizer.reasoning is not None
    assert tokenizer.special_id("[THINK]") == tokenizer.encode("[THINK]")[0]
    ids = tokenizer.encode("[THINK]é[/THINK]a<|im_end|>")
    hidden, shown = tokenizer.decoder(), tokenizer.decoder(("[THINK]", "[/THINK]"))
    assert "".join(hidden.push(token) for token in ids) == "éa"
    assert "".join(shown.push(token) for token in ids) == "[THINK]é[/THINK]a"
