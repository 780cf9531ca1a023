"""The requests that Codex sends, in the shape of its documentation, against a scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai.types.responses import response_create_params

from mlx_cluster.gateway import fields
from mlx_cluster.tokenizer import Tokenizer
from tests.fake_engine import Script
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEADERS = {
    "authorization": "Bearer token",
    "openai-beta": "responses=experimental",
    "originator": "codex_cli_rs",
    "session_id": "0199-1",
    "accept": "text/event-stream",
}
PATCH_GRAMMAR = 'start: begin_patch\nbegin_patch: "*** Begin Patch" LF\n%import common.LF'
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "name": "exec_command",
        "description": "Runs a command in a PTY.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {"cmd": {"type": "string"}, "yield_time_ms": {"type": "number"}},
            "required": ["cmd"],
            "additionalProperties": False,
        },
    },
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": PATCH_GRAMMAR},
    },
    {"type": "web_search", "external_web_access": False},
]
CALL = '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "ls"}}\n</tool_call>'


def said(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


OPENING = [
    said("developer", "<permissions instructions>none</permissions instructions>"),
    said("user", "<environment_context>\n  <cwd>/x</cwd>\n</environment_context>"),
    said("user", "list the files"),
]


def request(items: list[Any]) -> dict[str, Any]:
    return {
        "model": "tiny",
        "instructions": "You are Codex.",
        "input": items,
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-1",
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "i"},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tokenizer_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[World]:
    async with running(tokenizer_dir, tokenizer) as made:
        made.routes.served[0] = replace(made.routes.served[0], max_context=8192)
        yield made


async def streamed(world: World, items: list[Any]) -> tuple[list[dict[str, Any]], Any]:
    answer = await world.http.post("/v1/responses", json=request(items), headers=HEADERS)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines], answer.headers


def done(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


async def test_a_command_is_run_and_its_output_comes_back(world: World) -> None:
    world.engine(text=f"hello {CALL}")
    events, headers = await streamed(world, OPENING)
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["total_tokens"] > 0
    message, call = done(events)
    assert json.loads(call["arguments"]) == {"cmd": "ls"}
    assert set(headers["x-mlx-cluster-ignored"].split(", ")) == {
        "tools[web_search]",
        "reasoning.effort",
        "reasoning.summary",
        "text.verbosity",
        "include[reasoning.encrypted_content]",
    }
    engine = world.engine(text="hello")
    reasoning = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAA"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Exit code: 0\nOutput:\na.py"}
    events, _ = await streamed(world, [*OPENING, reasoning, message, call, result])
    assert events[-1]["type"] == "response.completed"
    prompt = "".join(world.tokenizer.token_text(token_id) for token_id in engine.requests[0].prompt)
    assert "You are Codex." in prompt.partition("<|im_end|>")[0]
    assert "Exit code: 0" in prompt


async def test_a_patch_is_plain_text(world: World) -> None:
    world.engine(text='<tool_call>\n{"name": "apply_patch"}\n*** Begin Patch\n\n</tool_call>')
    events, _ = await streamed(world, OPENING)
    (call,) = done(events)
    assert (call["type"], call["input"]) == ("custom_tool_call", "*** Begin Patch\n")
    world.engine(text="hello")
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "Done!"}
    events, _ = await streamed(world, [*OPENING, call, result])
    assert events[-1]["type"] == "response.completed"


async def test_a_failed_response_ends_the_stream_at_once(world: World) -> None:
    world.engine(Script(tokens=(5, 6), ends_early=True))
    events, _ = await streamed(world, OPENING)
    assert events[-1]["type"] == "response.failed"


@pytest.mark.parametrize(
    "params",
    [response_create_params.ResponseCreateParamsBase, response_create_params.ResponseCreateParamsStreaming],
)
async def test_every_field_of_the_sdk_has_its_rule(params: Any) -> None:
    assert set(params.__annotations__) <= set(fields.RESPONSES)
