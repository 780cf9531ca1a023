"""The requests that Claude Code sends, in the shape of its documentation, against a scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params

from mlx_cluster.gateway import fields
from mlx_cluster.tokenizer import Tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

EPHEMERAL = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "authorization": "Bearer token",
    "x-app": "cli",
    "x-stainless-retry-count": "0",
    "user-agent": "claude-cli/2.1.0 (external, cli)",
}
READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"file_path": {"type": "string"}, "limit": {"type": "number", "exclusiveMinimum": 0}},
        "required": ["file_path"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>\n{"name": "Read", "arguments": {"file_path": "/a.py"}}\n</tool_call>'


def request(number: int, messages: list[Any]) -> dict[str, Any]:
    accounting = f"x-anthropic-billing-header: cc_version=2.1.0.{number}; cc_entrypoint=cli; cch={number:05x};"
    return {
        "model": "tiny",
        "max_tokens": 32_000,
        "stream": True,
        "system": [
            {"type": "text", "text": accounting},
            {"type": "text", "text": "You are Claude Code.", **EPHEMERAL},
            {"type": "text", "text": "Be brief.", **EPHEMERAL},
        ],
        "messages": messages,
        "tools": [READ, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "temperature": 1,
    }


def asked(text: str) -> dict[str, Any]:
    reminder = {"type": "text", "text": "<system-reminder>today</system-reminder>"}
    return {"role": "user", "content": [reminder, {"type": "text", "text": text, **EPHEMERAL}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    async with running(tokenizer_dir, tokenizer) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=8192)
        yield made


async def streamed(world: World, body: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    answer = await world.http.post("/v1/messages?beta=true", json=body, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines], answer.headers


async def test_a_tool_is_called_and_its_result_comes_back(world: World) -> None:
    world.engine(text=f"hello {CALL}")
    events, headers = await streamed(world, request(1, [asked("read a.py")]))
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == ["text", "tool_use"]
    assert set(headers["x-mlx-cluster-ignored"].split(", ")) == {
        "tools[web_search_20250305]",
        "interleaved-thinking-2025-05-14",
        "thinking",
        "output_config.effort",
    }
    called = {"type": "tool_use", "id": starts[1]["id"], "name": "Read", "input": {"file_path": "/a.py"}}
    result = {"type": "tool_result", "tool_use_id": starts[1]["id"], "content": "1\tx = 1", **EPHEMERAL}
    world.engine(text="hello")
    turns = [
        asked("read a.py"),
        {"role": "assistant", "content": [{"type": "text", "text": "hello"}, called]},
        {"role": "user", "content": [result]},
    ]
    events, _ = await streamed(world, request(2, turns))
    assert events[-2]["delta"]["stop_reason"] == "end_turn"


async def test_the_prompt_of_a_next_request_begins_like_the_one_before(world: World) -> None:
    engine = world.engine(text="hello")
    await streamed(world, request(1, [asked("hi")]))
    turns = [asked("hi"), {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}, asked("more")]
    await streamed(world, request(77, turns))
    first, second = (request.prompt for request in engine.requests)
    assert second[: len(first)] == first


async def test_its_small_requests(world: World) -> None:
    world.engine(text="hello")
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}
    answer = await world.http.post("/v1/messages?beta=true", json=body, headers=HEADERS)
    assert answer.json()["stop_reason"] == "max_tokens"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "foo"}], "tools": [READ]}
    answer = await world.http.post("/v1/messages/count_tokens?beta=true", json=body, headers=HEADERS)
    assert answer.json()["input_tokens"] > 20


# Sent as headers, whatever the SDK calls them.
_HEADERS = {"betas", "user_profile_id", "workspace_id"}


@pytest.mark.parametrize(
    "params",
    [
        message_create_params.MessageCreateParamsBase,
        message_create_params.MessageCreateParamsStreaming,
        message_count_tokens_params.MessageCountTokensParams,
        beta_params.MessageCreateParamsBase,
    ],
)
async def test_every_field_of_the_sdk_has_its_rule(params: Any) -> None:
    assert set(params.__annotations__) - set(fields.MESSAGES) <= _HEADERS
