"""What a gateway says of itself: models, health, readiness, metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mlx_cluster.tokenizer import Tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_models(world: World) -> None:
    models = [model async for model in world.sdk.models.list()]
    assert [model.id for model in models] == ["tiny", "org/late"]
    assert (await world.sdk.models.retrieve("gpt-tiny")).id == "tiny"
    late = await world.http.get("/v1/models/org/late")
    assert (late.json()["id"], late.json()["state"], late.json()["object"]) == ("org/late", "loading", "model")


async def test_alias_patterns_stand_for_every_name_of_their_form(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        good = world.routes.served[0]
        world.routes.served = [
            dataclasses.replace(good, aliases=("claude-*", "gpt-4o")),
            dataclasses.replace(good, id="org/large", aliases=("claude-opus-*",)),
        ]
        for name, found in {
            "claude-sonnet-4-5": "tiny",
            "claude-opus-4": "org/large",
            "gpt-4o": "tiny",
            "org/large": "org/large",
        }.items():
            assert (await world.sdk.models.retrieve(name)).id == found
        assert (await world.http.get("/v1/models/gpt-5")).status_code == 404
        listed = (await world.http.get("/v1/models")).json()["data"][0]
        assert (listed["aliases"], listed["alias_patterns"]) == (["gpt-4o"], ["claude-*"])


async def test_codex_gets_the_list_that_it_reads(world: World) -> None:
    answer = await world.http.get("/v1/models", params={"client_version": "0.153.4"})
    models = answer.json()["models"]
    assert [model["slug"] for model in models] == ["tiny", "org/late"]
    required = {
        "display_name", "supported_reasoning_levels", "shell_type", "visibility", "supported_in_api", "priority",
        "base_instructions", "supports_reasoning_summaries", "support_verbosity", "truncation_policy",
        "supports_parallel_tool_calls", "experimental_supported_tools",
    }  # fmt: skip
    assert required <= models[0].keys()
    assert (models[0]["context_window"], models[0]["input_modalities"]) == (512, ["text"])


async def test_health_names_the_state_of_every_model(world: World) -> None:
    answer = await world.http.get("/health")
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "ok"
    assert body["node"] == {"id": 0, "name": "mini1"}
    assert body["models"][1] == {"id": "org/late", "state": "loading", "detail": "stage 1 of 3"}
    assert (await world.http.get("/livez")).status_code == 200
    assert (await world.http.get("/readyz")).status_code == 200


async def test_not_ready_until_a_model_is(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        world.routes.served = world.routes.served[1:]
        answer = await world.http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "no model is ready: 'org/late' is loading (stage 1 of 3)"
        assert (await world.http.get("/health")).status_code == 503
        assert (await world.http.get("/livez")).status_code == 200
        world.routes.served = []
        assert "none is configured" in (await world.http.get("/readyz")).text
        assert (await world.http.get("/")).status_code == 200


async def test_the_hint_page_shows_a_request_that_can_be_pasted(world: World) -> None:
    text = (await world.http.get("/")).text
    assert f"curl {world.url}/v1/chat/completions" in text
    assert '"model": "tiny"' in text


async def test_metrics_are_in_the_text_format(world: World) -> None:
    await world.http.get("/nothing")
    answer = await world.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'mlx_cluster_gateway_requests_total{route="other",status="404"}' in answer.text


async def test_the_openapi_document_has_the_schemas_of_the_bodies(world: World) -> None:
    paths = (await world.http.get("/openapi.json")).json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in schema["properties"]


async def test_a_model_whose_tokenizer_is_missing_here_is_unavailable(
    tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async with running(tokenizer_dir, tokenizer) as world:
        world.engine(text="x")
        good = world.routes.served[0]
        world.routes.served[0] = dataclasses.replace(good, model_dir=str(tmp_path / "nowhere"))
        body = {"model": "tiny", "prompt": "x"}
        answer = await world.http.post("/v1/completions", json=body)
        assert answer.status_code == 503
        assert str(tmp_path) not in answer.text
        world.routes.served[0] = good
        assert (await world.http.post("/v1/completions", json=body)).status_code == 200
