"""/v1/embeddings through the real OpenAI SDK: forms, bounds, and models that give none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from mlx_cluster.errors import Unavailable
from mlx_cluster.request import SequenceRequest
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script, served_model
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vectors(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    async with running(tokenizer_dir, tokenizer) as made:
        made.routes.served = [
            served_model(tokenizer_dir, embeddings="last", max_context=8),
            served_model(tokenizer_dir, id="talker", aliases=()),
        ]
        yield made


def direction(request: SequenceRequest) -> tuple[float, ...]:
    """A vector of length 1 that tells the number of tokens."""
    return (0.6, 0.0, 0.8) if len(request.prompt) == 1 else (0.0, 1.0, 0.0)


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
async def test_each_text_has_its_vector_in_order(vectors: World, encoding_format: Any) -> None:
    engine = vectors.engine(Script(pooled=direction))
    more = {} if encoding_format is None else {"encoding_format": encoding_format}
    answer = await vectors.sdk.embeddings.create(model="tiny", input=["a", "ab", "b"], **more)
    found = [entry.embedding for entry in answer.data]
    if encoding_format == "base64":
        assert all(isinstance(vector, str) for vector in found)
    else:
        assert [vector == pytest.approx(wanted) for vector, wanted in zip(
            found, [(0.6, 0.0, 0.8), (0.0, 1.0, 0.0), (0.6, 0.0, 0.8)], strict=True
        )] == [True] * 3  # fmt: skip
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (4, 4, "tiny")
    assert {(request.pool, request.max_tokens) for request in engine.requests} == {("last", 0)}


async def test_token_ids_and_fewer_dimensions(vectors: World) -> None:
    engine = vectors.engine(Script(pooled=direction))
    answer = await vectors.sdk.embeddings.create(model="gpt-tiny", input=[5], dimensions=2)
    assert answer.data[0].embedding == pytest.approx([1.0, 0.0])
    await vectors.sdk.embeddings.create(model="tiny", input=[[5], [6, 7]])
    assert sorted(request.prompt for request in engine.requests) == [(5,), (5,), (6, 7)]


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"model": "talker", "input": "a"}, "model", "gives no embeddings"),
        ({"model": "tiny", "input": "aaaaaaaaa"}, "input", "context"),
        ({"model": "tiny", "input": ["a", ""]}, "input[1]", "empty"),
        ({"model": "tiny", "input": []}, "input", "empty"),
        ({"model": "tiny", "input": [1, "a"]}, "input", "token ids"),
        ({"model": "tiny", "input": [900_000]}, "input", "vocabulary"),
        ({"model": "tiny", "input": ["a"] * 2049}, "input", "2048"),
        ({"model": "tiny", "input": "a", "dimensions": 4}, "dimensions", "have 3"),
        ({"model": "tiny", "input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"model": "tiny", "input": "a", "task": "x"}, "task", "unknown"),
    ],
)
async def test_what_cannot_be_had_is_a_400_that_names_it(
    vectors: World, body: dict[str, Any], param: str, named: str
) -> None:
    vectors.engine(Script(pooled=direction))
    answer = await vectors.http.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert named in error["message"]


async def test_one_text_that_fails_fails_all_and_cancels_the_others(vectors: World) -> None:
    def script(request: SequenceRequest) -> Script:
        if request.choice == 1:
            return Script(refuse=Unavailable("the stage is gone"))
        return Script(admit=asyncio.Event())

    engine = vectors.engine(script)
    with pytest.raises(openai.InternalServerError, match="the stage is gone") as caught:
        await vectors.sdk.embeddings.create(model="tiny", input=["a", "b", "c"])
    assert caught.value.status_code == 503
    await engine.until(lambda: len(engine.cancelled) == len(engine.requests) - 1)
