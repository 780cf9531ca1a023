"""Mutated bodies of both dialects: each is an ``Ask`` or a typed complaint, nothing else."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway.messages import parse_count, parse_messages
from mlx_cluster.gateway.responses import parse_responses
from tests.unit.gateway import test_messages_claude_code, test_responses_codex

MUTANTS: list[Any] = [
    None,
    True,
    0,
    -1,
    1e400,
    2**70,
    "",
    "x" * 300,
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"type": "text"},
    {"type": "function"},
    {"type": ["x"]},
    {"": ""},
    [{"role": "user"}],
]
TURNS = [
    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "x", "input": {}}]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": ""}]}],
    },
]
ITEMS = [
    {"type": "function_call", "call_id": "1", "name": "x", "arguments": "{"},
    {"type": "custom_tool_call", "call_id": "2", "name": "y", "input": ""},
    {"type": "function_call_output", "call_id": "1", "output": ""},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "content": None},
]
MESSAGES = {**test_messages_claude_code.request(1, [test_messages_claude_code.asked("hi"), *TURNS]), "max_tokens": 9}
RESPONSES = test_responses_codex.request([*test_responses_codex.OPENING, *ITEMS])


def mutated(body: Any, chance: random.Random) -> Any:
    """The body with one of its values, anywhere, put away or replaced."""
    body = copy.deepcopy(body)
    node = body
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return body
        key = chance.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and chance.random() < 0.8:
            node = node[key]
            continue
        if chance.random() < 0.2:
            del node[key]
        else:
            node[key] = chance.choice(MUTANTS)
        return body


@pytest.mark.parametrize(
    ("parse", "body"), [(parse_messages, MESSAGES), (parse_count, MESSAGES), (parse_responses, RESPONSES)]
)
def test_a_mutated_body_is_taken_or_refused_by_name(parse: Any, body: Any) -> None:
    chance = random.Random(7)
    complaints: list[InvalidRequest] = []
    for _ in range(600):
        raw = json.dumps(mutated(mutated(body, chance), chance)).encode()
        try:
            parsed = parse(raw)
            if parse is parse_responses:
                parsed.body.to_ask()
        except InvalidRequest as complaint:
            complaints.append(complaint)
    assert 50 < len(complaints) < 550
    assert all(complaint.param is not None or complaint.code == "invalid_json" for complaint in complaints)
    assert max(len(str(complaint)) for complaint in complaints) < 1000
