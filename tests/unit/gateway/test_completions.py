"""Plain completions through the real OpenAI SDK."""

from __future__ import annotations

import pytest

from tests.unit.gateway.conftest import World

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
