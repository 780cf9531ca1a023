"""Plain completions through the real OpenAI SDK."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from mlx_cluster.request import SequenceRequest
from mlx_cluster.tokenizer import load
from tests.fake_engine import Script, write_byte_level_tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_text_prompt(world: World) -> None:
    engine = world.engine(text="hello")
    answer = await world.sdk.completions.create(model="tiny", prompt="say hello")
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "hello",
        "stop",
    )
    assert answer.id.startswith("cmpl-")
    assert engine.requests[0].prompt == world.tokenizer.encode("say hello")
    assert engine.requests[0].max_tokens == 16


async def test_a_long_text_prompt_is_tokenized_off_the_loop_and_the_same(world: World) -> None:
    engine = world.engine(text="x")
    await world.sdk.completions.create(model="tiny", prompt="wörds " * 60)
    assert engine.requests[0].prompt == world.tokenizer.encode("wörds " * 60)


async def test_a_prompt_of_token_ids(world: World) -> None:
    engine = world.engine(text="x")
    await world.sdk.completions.create(model="tiny", prompt=[5, 6, 7])
    await world.sdk.completions.create(model="tiny", prompt=[[8, 9]])
    assert [request.prompt for request in engine.requests] == [(5, 6, 7), (8, 9)]


async def test_a_stream(world: World) -> None:
    world.engine(text="hello👋")
    stream = await world.sdk.completions.create(
        model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["hello", "👋", ""]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


async def test_logprobs_have_offsets_into_the_text(world: World) -> None:
    engine = world.engine(text="hello w👋!")
    answer = await world.sdk.completions.create(model="tiny", prompt="x", logprobs=1)
    assert engine.requests[0].sampling.top_logprobs == 1
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [
        "hello",
        " w",
        "bytes:\\xf0",
        "bytes:\\x9f",
        "bytes:\\x91",
        "bytes:\\x8b",
        "!",
    ]
    assert logprobs.text_offset == [0, 5, 7, 7, 7, 7, 8]
    assert logprobs.token_logprobs == [-token / 100 for token in world.tokenizer.encode("hello w👋!")]
    assert logprobs.top_logprobs is not None
    assert list(logprobs.top_logprobs[0]) == ["hello"]


async def test_offsets_go_on_over_the_chunks_of_a_stream(world: World) -> None:
    world.engine(text="hello w!")
    stream = await world.sdk.completions.create(model="tiny", prompt="x", logprobs=0, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset async for chunk in stream if chunk.choices[0].logprobs]
    assert offsets == [[0], [5], [7]]


async def test_best_of_equal_to_n_is_what_happens_anyway(world: World) -> None:
    world.engine(text="x")
    answer = await world.sdk.completions.create(model="tiny", prompt="x", n=2, best_of=2, echo=False)
    assert len(answer.choices) == 2


async def test_a_batch_is_answered_prompt_by_prompt(world: World) -> None:
    def script(request: SequenceRequest) -> Script:
        return Script(tokens=[*world.tokenizer.encode(f"{len(request.prompt)}"), *world.tokenizer.eos_token_ids])

    engine = world.engine(script)
    answer = await world.sdk.completions.create(model="tiny", prompt=["a", "abc"], n=2, seed=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "1"), (1, "1"), (2, "3"), (3, "3")]
    assert sorted((request.choice, len(request.prompt)) for request in engine.requests) == [
        (0, 1), (1, 1), (2, 3), (3, 3),
    ]  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4  # each prompt once
    stream = await world.sdk.completions.create(model="tiny", prompt=[[5], [6, 7, 8]], stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["1", "3"]


async def test_the_best_are_those_that_are_likely_on_average(world: World) -> None:
    def script(request: SequenceRequest) -> Script:
        # A token's log probability is -id/100 here.
        return Script(tokens=[3 + 10 * ((request.choice + 2) % 4), *world.tokenizer.eos_token_ids])

    engine = world.engine(script)
    answer = await world.sdk.completions.create(model="tiny", prompt="x", n=2, best_of=4)
    tokens = [world.tokenizer.token_text(3), world.tokenizer.token_text(13)]
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, tokens[0]), (1, tokens[1])]
    assert answer.choices[0].logprobs is None
    assert len(engine.requests) == 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8  # those that were thrown away were computed too


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_is_scored_where_logprobs_are_asked_for(world: World, stream: bool) -> None:
    engine = world.engine(text="hello")
    body = {"model": "tiny", "prompt": "hello w👋", "echo": True, "logprobs": 1, "stream": stream}
    ids = world.tokenizer.encode("hello w👋")
    if stream:
        chunks = [chunk async for chunk in await world.sdk.completions.create(**body)]  # type: ignore[call-overload]
        assert [chunk.choices[0].text for chunk in chunks] == ["hello w👋", "hello", ""]
        logprobs, own = chunks[0].choices[0].logprobs, chunks[1].choices[0].logprobs
        assert own.text_offset == [8]
    else:
        answer = await world.sdk.completions.create(**body)  # type: ignore[call-overload]
        assert answer.choices[0].text == "hello w👋hello"
        logprobs = answer.choices[0].logprobs
        assert (logprobs.tokens[-1], logprobs.text_offset[-1]) == ("hello", 8)
        assert answer.usage.completion_tokens == 2
    assert engine.requests[0].prompt_logprobs == 1
    assert logprobs.tokens[: len(ids)] == ["hello", " w", *(f"bytes:\\x{byte:02x}" for byte in "👋".encode())]
    assert logprobs.token_logprobs[: len(ids)] == [None, *(-token / 100 for token in ids[1:])]
    assert logprobs.text_offset[: len(ids)] == [0, 5, 7, 7, 7, 7]
    assert logprobs.top_logprobs[0] is None
    assert list(logprobs.top_logprobs[1]) == [" w"]


async def test_an_echo_alone_shows_no_token_of_its_own(world: World) -> None:
    engine = world.engine(text="hello")
    answer = await world.sdk.completions.create(
        model="tiny", prompt=["he", [5, 6]], echo=True, max_tokens=0, logprobs=0
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.choices[0].text == "he"
    assert [len(choice.logprobs.tokens) for choice in answer.choices if choice.logprobs] == [1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert {request.max_tokens for request in engine.requests} == {1}


async def test_a_model_without_tokens_for_it_fills_in_no_middle(world: World) -> None:
    with pytest.raises(openai.BadRequestError, match="no tokens to fill in") as caught:
        await world.sdk.completions.create(model="tiny", prompt="def f():", suffix="return 1")
    assert caught.value.param == "suffix"


async def test_a_model_with_tokens_for_it_gets_prefix_and_suffix(tmp_path: Path) -> None:
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    tokenizer = load(write_byte_level_tokenizer(tmp_path, more_special=names))
    async with running(tmp_path, tokenizer) as world:
        engine = world.engine(text="x = 1")
        answer = await world.sdk.completions.create(model="tiny", prompt="a", suffix="b")
        assert answer.choices[0].text == "x = 1"
        shown = [tokenizer.token_text(token_id) for token_id in engine.requests[0].prompt]
        assert shown == ["<|fim_prefix|>", "a", "<|fim_suffix|>", "b", "<|fim_middle|>"]
