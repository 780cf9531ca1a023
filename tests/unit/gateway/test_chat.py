"""Chat completions through the real OpenAI SDK, a real server and a scripted engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mlx_cluster.request import Sampling
from tests.fake_engine import Script
from tests.unit.gateway.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI: list[Any] = [{"role": "user", "content": "hi"}]


async def events(world: World, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
    """The data of all SSE events of a stream, JSON decoded; the last one is checked to be [DONE]."""
    answer = await world.http.post(path, json={"model": "tiny", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_whole_answer(world: World) -> None:
    engine = world.engine(text="hello wörld 👋")
    answer = await world.sdk.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == "hello wörld 👋"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, answer.object) == ("tiny", "chat.completion")
    assert answer.id.startswith("chatcmpl-")
    request = engine.requests[0]
    assert request.prompt == world.tokenizer.render_chat(HI)
    assert request.stop_token_ids == world.tokenizer.eos_token_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == engine.num_emitted
    assert answer.usage.total_tokens == len(request.prompt) + engine.num_emitted


async def test_a_stream_has_one_event_per_token_with_text(world: World) -> None:
    world.engine(text="hello w👋!")
    stream = await world.sdk.chat.completions.create(model="tiny", messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "hello", " w", "👋", "!", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_max_tokens_ends_with_length(world: World) -> None:
    engine = world.engine(text="hello hello")
    answer = await world.sdk.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello ", "length")
    assert engine.requests[0].max_tokens == 2


async def test_a_character_that_is_cut_off_by_the_limit_shows_one_replacement(world: World) -> None:
    world.engine(text="a👋")
    deltas = [event["choices"][0]["delta"] for event in await events(world, messages=HI, max_tokens=3)]
    assert [delta.get("content") for delta in deltas] == ["", "a", "\ufffd", None]


async def test_without_a_limit_the_rest_of_the_context_is_the_limit(world: World) -> None:
    engine = world.engine(text="x")
    await world.sdk.chat.completions.create(model="tiny", messages=HI)
    assert engine.requests[0].max_tokens == 512 - len(engine.requests[0].prompt)


async def test_n_choices_run_as_n_sequences_with_one_seed(world: World) -> None:
    engine = world.engine()
    words = {0: "first", 1: "second", 2: "third"}
    engine.script = lambda request: Script(tokens=world.tokenizer.encode(words[request.choice]), cached_tokens=7)
    answer = await world.sdk.chat.completions.create(model="tiny", messages=HI, n=3, seed=5)
    assert {choice.index: choice.message.content for choice in answer.choices} == words
    assert sorted(request.choice for request in engine.requests) == [0, 1, 2]
    assert {request.sampling.seed for request in engine.requests} == {5}
    assert len({request.request_id for request in engine.requests}) == 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens == engine.num_emitted
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7


async def test_n_choices_stream_side_by_side(world: World) -> None:
    world.engine(text="hello w")
    texts = {0: "", 1: ""}
    ends = []
    for event in await events(world, messages=HI, n=2):
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends.append((choice["index"], choice["finish_reason"]))
    assert texts == {0: "hello w", 1: "hello w"}
    assert sorted(ends) == [(0, "stop"), (1, "stop")]


async def test_a_stop_string_across_tokens_is_not_shown_and_cancels_the_engine(world: World) -> None:
    go = asyncio.Semaphore(100)
    tokens = world.tokenizer.encode("hello STOP and much more")
    assert [world.tokenizer.token_text(token) for token in tokens[2:4]] == ["ST", "OP"]
    engine = world.engine(Script(tokens=tokens, go=go))
    stream = await world.sdk.chat.completions.create(model="tiny", messages=HI, stop="STOP", stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "hello", " ", None]
    assert chunks[-1].choices[0].finish_reason == "stop"
    await engine.until(lambda: len(engine.cancelled) + len(engine.finished) == 1)


async def test_a_stop_string_ends_one_choice_and_its_sequence_only(world: World) -> None:
    engine = world.engine()
    hold = asyncio.Semaphore(0)
    endless = [*world.tokenizer.encode("x STOP"), *world.tokenizer.encode("never shown")]
    first_six = asyncio.Semaphore(6)
    engine.script = lambda request: (
        Script(tokens=endless, go=first_six)
        if request.choice == 0
        else Script(tokens=world.tokenizer.encode("hello"), go=hold)
    )
    creating = asyncio.create_task(world.sdk.chat.completions.create(model="tiny", messages=HI, n=2, stop=["STOP"]))
    await engine.until(lambda: len(engine.cancelled) == 1)
    assert engine.cancelled[0][1] == 0
    hold.release()
    answer = await creating
    assert [choice.message.content for choice in answer.choices] == ["x ", "hello"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


async def test_text_held_back_for_a_stop_string_comes_at_the_end(world: World) -> None:
    world.engine(text="hello ST")
    contents = [
        event["choices"][0]["delta"].get("content") for event in await events(world, messages=HI, stop=["STOP"])
    ]
    assert contents == ["", "hello", " ", "ST", None]


async def test_logprobs(world: World) -> None:
    world.engine(text="hello👋")
    answer = await world.sdk.chat.completions.create(
        model="tiny", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    hello, first_byte = entries
    hello_id = world.tokenizer.encode("hello")[0]
    assert (hello.token, hello.logprob, hello.bytes) == ("hello", -hello_id / 100, list(b"hello"))
    assert [top.logprob for top in hello.top_logprobs] == [-hello_id / 100, -hello_id / 100 - 1]
    assert first_byte.bytes == [0xF0]


async def test_a_stream_with_logprobs_has_one_event_per_token(world: World) -> None:
    world.engine(text="a👋")
    choices = [event["choices"][0] for event in await events(world, messages=HI, logprobs=True)]
    tokens = [choice for choice in choices if choice["logprobs"] is not None]
    assert [choice["delta"]["content"] for choice in tokens] == ["a", "", "", "", "👋"]
    assert b"".join(bytes(choice["logprobs"]["content"][0]["bytes"]) for choice in tokens) == "a👋".encode()
    assert all(choice["logprobs"]["content"][0]["top_logprobs"] == [] for choice in tokens)


async def test_logprobs_of_tokens_behind_a_stop_string_are_not_shown(world: World) -> None:
    world.engine(text="hello STOP more")
    choices = [event["choices"][0] for event in await events(world, messages=HI, logprobs=True, stop="STOP")]
    shown = [entry["token"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert shown == ["hello", " "]


async def test_usage_in_the_last_chunk_when_asked_for(world: World) -> None:
    engine = world.engine(text="hello w")
    chunks = await events(world, messages=HI, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    prompt = len(engine.requests[0].prompt)
    assert chunks[-1]["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_usage_in_every_chunk_when_asked_for(world: World) -> None:
    world.engine(text="hello w👋")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await events(world, messages=HI, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 6, 7, 7]


async def test_every_sampling_field_reaches_the_engine(world: World) -> None:
    engine = world.engine(text="x")
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.05,
        "seed": -1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"42": 5, "7": -100},
    }
    await events(world, messages=HI, **body)
    assert engine.requests[0].sampling == Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.05,
        seed=(1 << 63) - 1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias=((7, -100.0), (42, 5.0)),
    )


async def test_null_means_absent(world: World) -> None:
    engine = world.engine(text="x")
    nulls = ["temperature", "top_p", "stop", "seed", "n", "logprobs", "max_tokens", "tools", "response_format", "user"]
    await events(world, messages=HI, **dict.fromkeys(nulls))
    seed = engine.requests[0].sampling.seed
    assert engine.requests[0].sampling == Sampling(seed=seed)


async def test_without_a_seed_each_request_draws_its_own(world: World) -> None:
    engine = world.engine(text="x")
    for _ in range(3):
        await world.sdk.chat.completions.create(model="tiny", messages=HI)
    seeds = {request.sampling.seed for request in engine.requests}
    assert len(seeds) == 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)


async def test_ignore_eos_goes_on_to_the_limit(world: World) -> None:
    end = next(iter(world.tokenizer.eos_token_ids))
    engine = world.engine(Script(tokens=[*world.tokenizer.encode("a"), end, *world.tokenizer.encode("b")]))
    answer = await world.sdk.chat.completions.create(
        model="tiny", messages=HI, max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert engine.requests[0].stop_token_ids == frozenset()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("ab", "length")


async def test_an_alias_is_the_model_and_the_answer_names_the_model(world: World) -> None:
    engine = world.engine(text="x")
    answer = await world.sdk.chat.completions.create(model="gpt-tiny", messages=HI)
    assert (answer.model, engine.requests[0].model) == ("tiny", "tiny")


async def test_text_parts_and_the_developer_role(world: World) -> None:
    engine = world.engine(text="x")
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    await events(world, messages=[{"role": "developer", "content": "brief"}, {"role": "user", "content": parts}])
    assert engine.requests[0].prompt == world.tokenizer.render_chat(
        [{"role": "system", "content": "brief"}, {"role": "user", "content": "one, two"}]
    )


async def test_an_answer_of_the_sdk_can_be_sent_back(world: World) -> None:
    world.engine(text="hello")
    first = await world.sdk.chat.completions.create(model="tiny", messages=HI)
    history: list[Any] = [*HI, first.choices[0].message.model_dump(), *HI]
    second = await world.sdk.chat.completions.create(model="tiny", messages=history)
    assert second.choices[0].message.content == "hello"


async def test_advisory_fields_are_accepted(world: World) -> None:
    world.engine(text="x")
    advisory = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"}
    assert await events(world, messages=HI, tools=[], tool_choice="none", response_format={"type": "text"}, **advisory)


async def test_a_long_body_is_parsed_too(world: World) -> None:
    world.engine(text="x")
    filler = [{"role": "user", "content": ""}] * 5
    answer = await world.http.post(
        "/v1/chat/completions",
        content=json.dumps({"model": "tiny", "messages": [*filler, *HI]}).ljust(60_000),
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert answer.status_code == 200


async def test_metrics_count_what_was_served(world: World) -> None:
    before = world.metric("completion_tokens_total", model="tiny")
    answered = world.metric("requests_total", route="/v1/chat/completions", status="200")
    first_tokens = world.metric("ttft_seconds_count", model="tiny")
    engine = world.engine(text="hello w")
    await world.sdk.chat.completions.create(model="tiny", messages=HI)
    assert world.metric("completion_tokens_total", model="tiny") == before + engine.num_emitted
    assert world.metric("requests_total", route="/v1/chat/completions", status="200") == answered + 1
    assert world.metric("ttft_seconds_count", model="tiny") == first_tokens + 1
    assert world.metric("in_flight") == 0


async def test_a_seed_comes_with_the_fingerprint_of_what_it_holds_for(world: World) -> None:
    prints = set()
    for _ in range(2):
        world.engine(text="x")
        answer = await world.sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], seed=3
        )
        prints.add(answer.system_fingerprint)
    world.engine(text="x")
    stream = await world.sdk.completions.create(model="tiny", prompt="hi", seed=3, stream=True)
    prints |= {chunk.system_fingerprint async for chunk in stream}
    (fingerprint,) = prints
    assert fingerprint
    assert fingerprint.startswith("fp_")
