"""Bodies: every field of the OpenAI SDK has a rule, and what is wrong is said by name, value and remedy."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mlx_cluster.errors import InvalidRequest
from mlx_cluster.gateway import fields
from mlx_cluster.gateway.schemas import ChatBody, CompletionBody, parse_chat, parse_completion

FUNCTION = {"type": "function", "function": {"name": "f"}}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def refusal_of(body: Any, parse: Any = parse_chat) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(
    ("params", "table"),
    [
        (chat_create_params.CompletionCreateParamsStreaming, fields.CHAT),
        (completion_create_params.CompletionCreateParamsStreaming, fields.COMPLETION),
    ],
)
def test_every_field_of_the_sdk_has_a_rule(params: Any, table: Any) -> None:
    assert set(get_type_hints(params)) - set(table) == set()


@pytest.mark.parametrize(("body", "table"), [(ChatBody, fields.CHAT), (CompletionBody, fields.COMPLETION)])
def test_honoured_fields_are_exactly_those_with_a_type(body: Any, table: Any) -> None:
    assert {name for name, rule in table.items() if rule.kind == "honoured"} == set(body.model_fields)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"messages": [{"role": "assistant", "audio": {"id": "1"}}]}, "messages[0].audio"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    error = refusal_of({**CHAT, **change})
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert param in str(error)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 17}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "suffix": "x"}, "suffix"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 13}, "prompt"),
    ],
)
def test_what_completions_cannot_do_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    error = refusal_of({**COMPLETION, **change}, parse_completion)
    assert (error.param, error.code) == (param, "invalid_value")


@pytest.mark.parametrize(
    "change", [{"foo": 1}, {"stream": True, "stream_options": {"foo": 1}}, {"messages": [{"role": "user", "foo": 1}]}]
)
def test_an_unknown_field_is_refused_by_name(change: dict[str, Any]) -> None:
    error = refusal_of({**CHAT, **change})
    assert error.code == "unknown_parameter"
    assert "foo" in (error.param or "")
    assert "foo" in str(error)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"temperature": 2.5}, "temperature is 2.5: it must be at most 2"),
        ({"temperature": "hot"}, 'temperature is "hot": it should be a number'),
        ({"temperature": True}, "temperature is true: it should be a number"),
        ({"top_p": -0.1}, "top_p is -0.1: it must be at least 0"),
        ({"top_k": -2}, "top_k is -2: it must be at least -1"),
        ({"min_p": 1.5}, "min_p is 1.5: it must be at most 1"),
        ({"max_tokens": 0}, "max_tokens is 0: it must be at least 1"),
        ({"max_tokens": -5}, "max_tokens is -5: it must be at least 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens is 1.5: it should be"),
        ({"max_tokens": "100"}, 'max_tokens is "100": it should be an integer'),
        ({"max_tokens": True}, "max_tokens is true: it should be an integer"),
        ({"n": 0}, "n is 0: it must be at least 1"),
        ({"n": 17}, "n is 17: it must be at most 16"),
        ({"seed": 1 << 63}, f"seed is {1 << 63}: it must be less than"),
        ({"presence_penalty": 3}, "presence_penalty is 3: it must be at most 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be greater than 0"),
        ({"stop": ["a"] * 5}, "it may have at most 4 entries"),
        ({"stop": ""}, 'stop is "": it must not be empty'),
        ({"stop": 7}, "stop is 7: it should be a list"),
        ({"stream": "yes"}, 'stream is "yes": it should be true or false'),
        ({"logit_bias": {"hello": 1}}, "it should be a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1 is 101: it must be at most 100"),
        ({"logit_bias": [1]}, "logit_bias is [1]: it should be an object"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21: it must be at most 20"),
        ({"messages": []}, "messages is []: it needs at least 1 entries"),
        ({"messages": "hi"}, 'messages is "hi": it should be a list'),
        ({"messages": ["hi"]}, 'messages[0] is "hi": it should be an object'),
        ({"messages": [{"content": "hi"}]}, "messages[0].role is required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'messages[0].role is "robot": it should be'),
        ({"messages": [{"role": "user", "tool_call_id": "x"}]}, "belongs into a message of the role 'tool'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "names 'g'"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "x"}}, "tool_choice.type is"),
        ({"tools": [FUNCTION, FUNCTION]}, "the same name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type is"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name is"),
        ({"response_format": {"type": "xml"}}, "response_format.type is"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is required"),
        ({"guided_choice": []}, "guided_choice is []"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "both bind the answer"),
        ({"response_format": json_schema({"const": "x" * 200_000})}, "make it smaller"),
        ({"guided_json": "{"}, "guided_json cannot be served"),
        ({"structured_outputs": {}}, "structured_outputs is empty"),
        ({"reasoning_effort": "huge"}, "reasoning_effort is"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize is not allowed"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "should be a bool"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is 5: it should be a string or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type is \"image_url\": it should be 'text'",
        ),
        ({"model": None}, "model is required"),
        ({"model": 5}, "model is 5: it should be a string"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(change: dict[str, Any], complaint: str) -> None:
    assert complaint in str(refusal_of({**CHAT, **change}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"top_logprobs": 2}, "set logprobs: true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "send one of them"),
        ({"stream_options": {"include_usage": True}}, "only allowed with stream: true"),
    ],
)
def test_fields_that_contradict_each_other(change: dict[str, Any], complaint: str) -> None:
    error = refusal_of({**CHAT, **change})
    assert complaint in str(error)
    assert error.param in change


@pytest.mark.parametrize("prompt", ["", [], [[]], 5, {}, [1, -1], [1.5], [True], [1, "a"]])
def test_a_bad_prompt_is_named(prompt: Any) -> None:
    error = refusal_of({**COMPLETION, "prompt": prompt}, parse_completion)
    assert (error.param or "").partition("[")[0] == "prompt"


def test_the_prompts_of_a_batch_are_named_by_their_place() -> None:
    assert refusal_of({**COMPLETION, "prompt": ["a", [1, -1]]}, parse_completion).param == "prompt[1]"
    assert parse_completion(json.dumps({**COMPLETION, "prompt": ["a", [1, 2]]}).encode()).prompts == ("a", (1, 2))


@pytest.mark.parametrize(
    "raw",
    [b"{", b"[]", b"nonsense", b'"text"', b'{"temperature": NaN}', b"\xff\xfe", b"[" * 50_000, b'{"model": "\\ud800"}'],
)
def test_what_is_not_a_json_object_is_said_to_be_none(raw: bytes) -> None:
    error = refusal_of(raw)
    assert (error.code, error.param) == ("invalid_json", None)


def test_a_top_p_of_zero_is_the_most_likely_token() -> None:
    sampling = parse_chat(json.dumps({**CHAT, "top_p": 0}).encode()).sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_a_huge_number_in_a_body_is_an_error_like_any_other() -> None:
    error = refusal_of(b'{"model": "m", "messages": [], "seed": ' + b"9" * 4000 + b"}")
    assert len(str(error)) < 400
