"""Valid requests for every route, which the mutations start from.

Owns: one or more rich bodies for each route; what a route without any gets.
Invariant: each of them is answered with 200 by a gateway in front of a scripted engine (``test_bodies`` checks it).
"""

from __future__ import annotations

from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "tags": {"type": "array", "items": {"enum": ["a", 1]}}},
    "required": ["name"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
HISTORY: list[Any] = [
    {"role": "developer", "content": [{"type": "text", "text": "Be brief é 漢 🎉"}]},
    {"role": "user", "content": "hello", "name": "u"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"name": "x"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "seen"},
    {"role": "user", "content": "and now?"},
]
SAMPLED: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "min_p": 0.01,
    "max_tokens": 8,
    "stop": ["STOP", "END"],
    "seed": 3,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "repetition_penalty": 1.1,
    "n": 2,
    "ignore_eos": False,
    "logit_bias": {"5": -1.5},
    "user": "u",
}

CHAT: list[dict[str, Any]] = [
    {**SAMPLED, "messages": HISTORY, "logprobs": True, "top_logprobs": 2, "metadata": {"a": "b"}},
    {
        "model": "tiny",
        "messages": HISTORY,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {
        "model": "gpt-tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    },
    {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "structured_outputs": {"regex": "[a-z]{1,5}"},
        "stream": True,
    },
]
COMPLETION: list[dict[str, Any]] = [
    {**SAMPLED, "prompt": "hello wor", "logprobs": 2},
    {"model": "tiny", "prompt": [5, 6, 7, 60], "stream": True, "stream_options": {"include_usage": True}},
    {"model": "tiny", "prompt": "x", "guided_choice": ["a", "bc"], "max_tokens": 3},
]
RESPONSES: list[dict[str, Any]] = [
    {
        "model": "tiny",
        "instructions": "Be brief",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "seen"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "auto",
        "stream": True,
        "store": False,
        "metadata": {"k": "v"},
        "reasoning": {"effort": "low"},
    },
    {
        "model": "tiny",
        "input": "hello",
        "max_output_tokens": 6,
        "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
    },
    {"model": "tiny", "input": "hello", "background": True},
]
MESSAGES: list[dict[str, Any]] = [
    {
        "model": "tiny",
        "max_tokens": 50,
        "system": [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "tool_use", "id": "t", "name": "look", "input": {"name": "x"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "seen"}]},
        ],
        "tools": [{"name": "look", "description": "Looks.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["STOP"],
        "stream": True,
        "metadata": {"user_id": "u"},
    },
    {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "top_k": 3},
]
TOKENIZE: list[dict[str, Any]] = [
    {"model": "tiny", "prompt": "hello é", "return_token_strs": True, "add_special_tokens": False},
    {"model": "tiny", "messages": HISTORY, "tools": [{"type": "function", "function": FUNCTION}]},
]
DETOKENIZE: list[dict[str, Any]] = [{"model": "tiny", "tokens": [5, 6, 7, 260]}]
ANY: list[dict[str, Any]] = [
    {"model": "tiny", "input": ["hello", "world"], "encoding_format": "base64", "dimensions": 3},
    {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False, "options": {"num_predict": 3}},
    {"model": "tiny", "prompt": "hi", "stream": True, "options": {"temperature": 0.5, "stop": ["x"]}, "format": "json"},
]

SEEDS: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}


def seeds_of(path: str) -> list[dict[str, Any]]:
    """Bodies for a route; one that is not known here gets those of its kind from elsewhere."""
    return SEEDS.get(path, ANY)
