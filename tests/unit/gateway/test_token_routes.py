"""/tokenize and /detokenize, the list of models in both dialects, and the refusal of embeddings."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.unit.gateway.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hello wörld"}]


async def post(world: World, path: str, **body: Any) -> Any:
    answer = await world.http.post(path, json={"model": "gpt-tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_text_becomes_ids_and_text_again(world: World) -> None:
    text = "hello <|im_end|> wörld 🙂"
    answer = await post(world, "/tokenize", prompt=text, return_token_strs=True)
    assert answer["tokens"] == list(world.tokenizer.encode(text))
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][0] == "hello"
    assert (await post(world, "/detokenize", tokens=answer["tokens"])) == {"prompt": text}


async def test_no_ids_are_no_text(world: World) -> None:
    assert await post(world, "/tokenize", prompt="") == {"count": 0, "max_model_len": 512, "tokens": []}
    assert await post(world, "/detokenize", tokens=[]) == {"prompt": ""}


async def test_a_conversation_gives_the_ids_that_the_engine_gets(world: World) -> None:
    engine = world.engine(text="x")
    await world.sdk.chat.completions.create(model="tiny", messages=MESSAGES)  # type: ignore[arg-type]
    answer = await post(world, "/tokenize", messages=MESSAGES)
    assert tuple(answer["tokens"]) == engine.requests[0].prompt


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "tiny"}, "prompt"),
        ("/tokenize", {"model": "tiny", "prompt": 3}, "prompt"),
        ("/tokenize", {"model": "tiny", "prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"model": "tiny", "messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"model": "tiny", "messages": MESSAGES, "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"model": "tiny", "prompt": "a", "temperature": 0}, "temperature"),
        ("/detokenize", {"model": "tiny", "tokens": [1, 1_000_000]}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": "abc"}, "tokens"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/v1/embeddings", {"model": "tiny", "input": "a"}, "model"),
    ],
)
async def test_what_cannot_be_done_is_a_400_that_names_it(
    world: World, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await world.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_negative_id_is_refused_by_its_place(world: World) -> None:
    answer = await world.http.post("/detokenize", json={"model": "tiny", "tokens": [1, -1]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tokens")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_an_unknown_model_is_404(world: World, path: str) -> None:
    body = {"model": "nobody", "tokens": [1]} if path == "/detokenize" else {"model": "nobody", "prompt": "a"}
    answer = await world.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_embeddings_are_refused_with_the_reason(world: World) -> None:
    answer = await world.http.post("/v1/embeddings", json={"model": "tiny", "input": "a", "encoding_format": "base64"})
    assert answer.json()["error"]["code"] == "unsupported_model"
    assert "gives no embeddings" in answer.json()["error"]["message"]


async def test_models_in_openai_s_form_say_context_state_and_aliases(world: World) -> None:
    tiny, late = (await world.http.get("/v1/models")).json()["data"]
    assert (tiny["max_context"], tiny["context_length"], tiny["max_model_len"]) == (512, 512, 512)
    assert (tiny["state"], tiny["aliases"], late["state"]) == ("ready", ["gpt-tiny"], "loading")


async def test_models_in_anthropic_s_form(world: World) -> None:
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list(limit=1)] == ["tiny", "org/late"]
        page = await client.models.list()
        assert (page.has_more, page.first_id, page.last_id) == (False, "tiny", "org/late")
        before = await client.models.list(before_id="org/late", limit=1)
        assert ([model.id for model in before.data], before.has_more) == (["tiny"], False)
        model = await client.models.retrieve("gpt-tiny")
        assert (model.type, model.id, model.display_name, model.created_at.year) == ("model", "tiny", "tiny", 2023)
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await client.models.retrieve("nobody")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=1001", "after_id=nobody", "after_id=tiny&before_id=tiny"]
)
async def test_bad_pages_are_refused(world: World, query: str) -> None:
    answer = await world.http.get(f"/v1/models?{query}", headers={"anthropic-version": "2023-06-01"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
