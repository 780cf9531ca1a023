"""Ollama's dialect through its own client: chat, generate, embed, and what is said of models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ollama
import pytest
import pytest_asyncio

from mlx_cluster.errors import Overloaded, StageLost
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script, served_model
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "hello"}}\n</tool_call>'


@pytest_asyncio.fixture(loop_scope="module")
async def client(world: World) -> AsyncIterator[ollama.AsyncClient]:
    made = ollama.AsyncClient(host=world.url)
    yield made
    await made._client.aclose()


async def post(world: World, path: str, **body: Any) -> Any:
    return await world.http.post(path, json={"model": "tiny", **body})


async def test_chat_in_one_piece(world: World, client: ollama.AsyncClient) -> None:
    engine = world.engine(Script(tokens=world.tokenizer.encode("hello w"), cached_tokens=2))
    answer = await client.chat(model="gpt-tiny:latest", messages=HI, options={"num_predict": 2, "seed": 5, "top_k": 7})
    assert (answer.message.role, answer.message.content, answer.model) == ("assistant", "hello w", "gpt-tiny:latest")
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", 2)
    assert answer.prompt_eval_count == len(engine.requests[0].prompt)
    assert answer.total_duration is not None
    assert answer.total_duration == (answer.prompt_eval_duration or 0) + (answer.eval_duration or 0) > 0
    sampling = engine.requests[0].sampling
    assert (sampling.seed, sampling.top_k, sampling.temperature, sampling.top_p) == (5, 7, 0.8, 0.9)
    assert engine.requests[0].max_tokens == 2


async def test_chat_streams_by_default_an_object_a_line(world: World, client: ollama.AsyncClient) -> None:
    world.engine(text="hello w👋")
    answer = await post(world, "/api/chat", messages=HI)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["message"]["content"] for line in lines] == ["hello", " w", "👋", ""]
    assert [line["done"] for line in lines] == [False, False, False, True]
    assert lines[-1]["done_reason"] == "stop"
    world.engine(text="hello w👋")
    parts = [part async for part in await client.chat(model="tiny", messages=HI, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == "hello w👋"


@pytest.mark.parametrize("raw", [True, False])
async def test_generate(world: World, client: ollama.AsyncClient, raw: bool) -> None:
    engine = world.engine(text="hello")
    answer = await client.generate(model="tiny", prompt="hi", system="" if raw else "Be kind.", raw=raw)
    assert (answer.response, answer.done_reason) == ("hello", "stop")
    text = "".join(world.tokenizer.token_text(token_id) for token_id in engine.requests[0].prompt)
    assert text == ("hi" if raw else "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
                    "<|im_start|>assistant\n")  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_is_called_and_its_result_comes_back(
    tokenizer_dir: Path, tokenizer: Tokenizer, stream: bool
) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        world.routes.served = [served_model(tokenizer_dir, max_context=8192)]
        client = ollama.AsyncClient(host=world.url)
        world.engine(text=CALL)
        if stream:
            parts = [part async for part in await client.chat(model="tiny", messages=HI, tools=[TOOL], stream=True)]
        else:
            parts = [await client.chat(model="tiny", messages=HI, tools=[TOOL])]
        (call,) = [call for part in parts for call in part.message.tool_calls or ()]
        assert (call.function.name, call.function.arguments) == ("look", {"place": "hello"})
        assert parts[-1].done_reason == "stop"
        engine = world.engine(text="ok")
        said = {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}
        result = {"role": "tool", "content": "a wall", "tool_name": "look"}
        await client.chat(model="tiny", messages=[*HI, said, result], tools=[TOOL])
        text = "".join(world.tokenizer.token_text(token_id) for token_id in engine.requests[0].prompt)
        assert text.index('{"place": "hello"}') < text.index("a wall")
        await client._client.aclose()


@pytest.mark.parametrize("wanted", ["json", {"type": "object", "properties": {"a": {"type": "integer"}}}])
async def test_a_format_binds_the_answer(world: World, client: ollama.AsyncClient, wanted: Any) -> None:
    engine = world.engine(text='{"a": 1}')
    answer = await client.chat(model="tiny", messages=HI, format=wanted)
    assert json.loads(answer.message.content or "") == {"a": 1}
    bound = engine.requests[0].grammar
    assert bound is not None
    assert bound.kind == "json_schema"


async def test_log_probabilities(world: World, client: ollama.AsyncClient) -> None:
    world.engine(text="hello")
    answer = await client.generate(model="tiny", prompt="hi", logprobs=True, top_logprobs=1)
    assert answer.logprobs is not None
    assert answer.logprobs[0].token == "hello"
    assert answer.logprobs[0].top_logprobs is not None
    assert len(answer.logprobs[0].top_logprobs) == 1


async def test_without_a_prompt_the_model_is_only_looked_for(world: World, client: ollama.AsyncClient) -> None:
    engine = world.engine(text="never said")
    assert (await client.generate(model="tiny", keep_alive=0)).done_reason == "load"
    assert (await client.chat(model="tiny", messages=[])).done_reason == "load"
    assert engine.requests == []


async def test_what_it_says_of_models(world: World, client: ollama.AsyncClient) -> None:
    listed = await client.list()
    assert [model.model for model in listed.models] == ["tiny:latest", "org/late:latest"]
    assert [model.model for model in (await client.ps()).models] == ["tiny:latest"]
    shown = await client.show("tiny:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert 512 in shown.modelinfo.values()
    assert (await world.http.get("/api/version")).json()["version"].count(".") == 2
    assert (await world.http.post("/api/show", json={"name": "tiny"})).status_code == 200


async def test_vectors(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        world.routes.served = [served_model(tokenizer_dir, embeddings="mean", max_context=2)]
        engine = world.engine(Script(pooled=lambda request: (1.0, float(len(request.prompt)))))
        client = ollama.AsyncClient(host=world.url)
        answer = await client.embed(model="tiny:latest", input=["a", "abcdef"])
        assert answer.embeddings == [[1.0, 1.0], [1.0, 2.0]]  # the second was cut to the context
        assert {request.pool for request in engine.requests} == {"mean"}
        assert (await client.embeddings(model="tiny", prompt="a")).embedding == [1.0, 1.0]
        with pytest.raises(ollama.ResponseError, match="context"):
            await client.embed(model="tiny", input="abcdef", truncate=False)
        assert (await client.show("tiny")).capabilities == ["embedding"]
        await client._client.aclose()


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "messages[0].images"),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}, 400, "images"),
        ("/api/generate", {"prompt": "x", "template": "{{ .Prompt }}"}, 400, "template"),
        ("/api/generate", {"prompt": "x", "context": [1]}, 400, "context"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/api/generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "system"),
        ("/api/chat", {"messages": HI, "options": {"temperature": 9}}, 400, "options.temperature"),
        ("/api/chat", {"messages": HI, "options": {"warmth": 9}}, 400, "options.unknown field 'warmth'"),
        ("/api/chat", {"messages": HI, "format": "xml"}, 400, "format"),
        ("/api/chat", {"messages": HI, "model": "nobody"}, 404, "nobody"),
        ("/api/chat", {"messages": HI, "model": "org/late"}, 503, "stage 1 of 3"),
        ("/api/embed", {"input": "x"}, 400, "gives no embeddings"),
        ("/api/pull", {}, 404, "/api/pull"),
    ],
)
async def test_errors_are_a_message_alone(world: World, path: str, body: Any, status: int, named: str) -> None:
    answer = await post(world, path, **body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert named in answer.json()["error"]


async def test_an_error_before_and_after_the_status(world: World, client: ollama.AsyncClient) -> None:
    world.engine(Script(refuse=Overloaded("queue full")))
    with pytest.raises(ollama.ResponseError, match="queue full") as caught:
        await client.chat(model="tiny", messages=HI)
    assert caught.value.status_code == 429
    world.engine(Script(tokens=world.tokenizer.encode("hello w"), fail_after=(1, StageLost("stage 1 is gone"))))
    with pytest.raises(ollama.ResponseError, match="gone"):
        [part async for part in await client.chat(model="tiny", messages=HI, stream=True)]


async def test_what_has_no_effect_is_named(world: World) -> None:
    world.engine(text="x")
    answer = await post(
        world,
        "/api/chat",
        messages=HI,
        think=True,
        keep_alive="5m",
        options={"mirostat": 2, "tfs_z": 1.0, "num_ctx": 4096, "repeat_last_n": 64},
    )
    assert answer.status_code == 200
    assert set(answer.headers["x-mlx-cluster-ignored"].split(", ")) == {
        "options.mirostat", "options.repeat_last_n", "think",
    }  # fmt: skip


async def test_a_waiting_stream_shows_life_in_whole_objects(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer, keepalive_seconds=0.02) as world:
        go = asyncio.Semaphore(0)
        world.engine(Script(tokens=tokenizer.encode("hello"), go=go))
        lines = 0
        async with (
            asyncio.timeout(20),
            world.http.stream("POST", "/api/chat", json={"model": "tiny", "messages": HI}) as answer,
        ):
            async for line in answer.aiter_lines():
                assert "done" in json.loads(line)
                lines += 1
                if lines == 3:
                    go.release()
        assert lines > 3
