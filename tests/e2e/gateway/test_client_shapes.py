"""The requests that Claude Code and Codex send, in the shape of their documentation, once each against a real model.

The same shapes run against a scripted engine in ``tests/unit/gateway``, where what the model says is decided.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.unit.gateway import test_messages_claude_code as claude_code
from tests.unit.gateway import test_responses_codex as codex

GREEDY = {"model": "demo", "temperature": 0}


def streamed(url: str, path: str, body: dict[str, Any], headers: dict[str, str]) -> list[dict[str, Any]]:
    answer = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=90, trust_env=False)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_claude_code_counts_asks_and_calls_a_tool(url: str) -> None:
    body = {**claude_code.request(1, [claude_code.asked("Read a.py")]), **GREEDY, "max_tokens": 120}
    counted = httpx.post(
        f"{url}/v1/messages/count_tokens?beta=true",
        json={name: body[name] for name in ("model", "system", "messages", "tools")},
        headers=claude_code.HEADERS,
        timeout=60,
        trust_env=False,
    )
    events = streamed(url, "/v1/messages?beta=true", body, claude_code.HEADERS)
    start = next(event for event in events if event["type"] == "message_start")
    assert (
        start["message"]["usage"]["input_tokens"] + start["message"]["usage"]["cache_read_input_tokens"]
        == (counted.json()["input_tokens"])
    )
    assert events[-1]["type"] == "message_stop"
    # A model of four million parameters seldom calls a tool by itself: told to, it must.
    forced = {**body, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 400}
    forced["tools"] = [{**claude_code.READ, "input_schema": _bounded(claude_code.READ["input_schema"])}]
    forced["tools"].append({"type": "web_search_20250305", "name": "web_search", "max_uses": 8})
    events = streamed(url, "/v1/messages?beta=true", forced, claude_code.HEADERS)
    (block,) = (event["content_block"] for event in events if event["type"] == "content_block_start")
    written = "".join(
        event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"
    )
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    arguments = json.loads(written)
    assert arguments["file_path"]
    turns = [
        claude_code.asked("Read a.py"),
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": block["id"], "name": "Read", "input": arguments}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "x = 1"}]},
    ]
    after = streamed(url, "/v1/messages?beta=true", {**body, "messages": turns}, claude_code.HEADERS)
    assert after[-1]["type"] == "message_stop"


def test_codex_asks_and_calls_a_tool(url: str) -> None:
    body = {**codex.request(codex.OPENING), **GREEDY, "max_output_tokens": 400}
    events = streamed(url, "/v1/responses", body, codex.HEADERS)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    shell = {**codex.TOOLS[0], "parameters": _bounded(codex.TOOLS[0]["parameters"])}
    forced = {**body, "tools": [shell, *codex.TOOLS[1:]], "tool_choice": {"type": "function", "name": "exec_command"}}
    events = streamed(url, "/v1/responses", forced, codex.HEADERS)
    assert events[-1]["type"] == "response.completed"
    (call,) = (event["item"] for event in events if event["type"] == "response.output_item.done")
    assert set(json.loads(call["arguments"])) <= {"cmd", "yield_time_ms"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Exit code: 0\nOutput:\na.py"}
    after = {**body, "input": [*codex.OPENING, call, result], "max_output_tokens": 20}
    events = streamed(url, "/v1/responses", after, codex.HEADERS)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    models = httpx.get(f"{url}/v1/models", headers=codex.HEADERS, timeout=60, trust_env=False)
    assert models.status_code == 200


def _bounded(schema: Any) -> Any:
    """The same schema with bounds that a small model meets within its tokens."""
    properties = {
        name: {**kind, "maxLength": 40} if kind["type"] == "string" else {"type": "integer", "minimum": 1, "maximum": 9}
        for name, kind in schema["properties"].items()
    }
    return {**schema, "properties": properties}
