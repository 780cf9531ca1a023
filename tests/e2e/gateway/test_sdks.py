"""The real SDKs of OpenAI and Anthropic, in strict validation mode, on every endpoint, against a real cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.cluster_processes import within

QUESTION = "What is a stage?"
STAGE = "A stage is a contiguous range of the model's layers that runs in its own process on one node."
ASKED: Any = [{"role": "user", "content": QUESTION}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Berlin", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLAUDE_TOOL: Any = {"name": "weather", "description": "d", "input_schema": PARAMETERS}
FLAT_TOOL: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
GREEDY = {"temperature": 0}  # this SDK has no parameter for it any more


class Pick(BaseModel):
    word: Annotated[str, Field(max_length=8)]
    kind: Literal["a", "b"]


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


# -- OpenAI: chat and completions ----------------------------------------------------------------------


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="demo", messages=ASKED, temperature=0, max_tokens=60, logprobs=True, top_logprobs=3, n=2, seed=1
    )
    assert [choice.message.content for choice in answer.choices] == [STAGE, STAGE]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert content is not None
    assert bytes(byte for entry in content for byte in entry.bytes or ()).decode() == STAGE
    assert {len(entry.top_logprobs) for entry in content} == {3}
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streamed(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model="gpt-4o-mini",
            messages=ASKED,
            temperature=0,
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == STAGE
    assert chunks[-1].usage is not None
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools(sdk: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "demo", "messages": ASKED, "tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
    answer = sdk.chat.completions.create(**asked, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert answer.choices[0].finish_reason == "tool_calls"
    with sdk.chat.completions.stream(**asked, parallel_tool_calls=False) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or ()
    jsonschema.validate(json.loads(streamed.function.arguments), PARAMETERS)
    history: Any = [
        *ASKED,
        answer.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = sdk.chat.completions.create(model="demo", messages=history, tools=[TOOL], max_tokens=8)
    assert after.choices[0].message.role == "assistant"


def test_structured_output(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": ASKED, "response_format": Pick, "max_tokens": 60}
    parsed = sdk.chat.completions.parse(**asked)
    assert isinstance(parsed.choices[0].message.parsed, Pick)
    with sdk.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Pick)


def test_completions(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model="demo", prompt="the pipeline", max_tokens=6, temperature=0, logprobs=2)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.choices[0].logprobs is not None
    # The SDK's own type has no null for finish_reason, which every chunk but the last has, the hosted service's too: a
    # stream of this old route is the one thing that strict mode cannot read.
    with openai.OpenAI(base_url=sdk.base_url, api_key="none", max_retries=0, timeout=60) as lenient:
        asked: Any = {"model": "demo", "prompt": "the pipeline", "max_tokens": 6, "temperature": 0}
        chunks = list(lenient.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    by_ids = sdk.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=2)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3


# -- OpenAI: responses ---------------------------------------------------------------------------------


def test_responses(sdk: openai.OpenAI) -> None:
    first = sdk.responses.create(model="demo", input=QUESTION, temperature=0, store=True, max_output_tokens=60)
    assert first.output_text == STAGE
    assert sdk.responses.retrieve(first.id).output_text == STAGE
    (item,) = sdk.responses.input_items.list(first.id).data
    assert item.type == "message"
    second = sdk.responses.create(
        model="demo", input="And how do I start it?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.previous_response_id == first.id
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(first.id)


def test_responses_streamed(sdk: openai.OpenAI) -> None:
    with sdk.responses.create(
        model="demo",
        input=ASKED,
        temperature=0,
        stream=True,
        max_output_tokens=60,
        include=["message.output_text.logprobs"],
    ) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == STAGE
    assert events[-1].type == "response.completed"
    with sdk.responses.stream(
        model="demo", input=QUESTION, tools=[FLAT_TOOL], tool_choice="required", parallel_tool_calls=False
    ) as tools:
        for _ in tools:
            pass
        (call,) = (item for item in tools.get_final_response().output if item.type == "function_call")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)


def test_responses_parsed(sdk: openai.OpenAI) -> None:
    parsed = sdk.responses.parse(model="demo", input=QUESTION, text_format=Pick, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Pick)


def test_responses_in_the_background(sdk: openai.OpenAI) -> None:
    queued = sdk.responses.create(model="demo", input=QUESTION, temperature=0, background=True, max_output_tokens=60)
    assert queued.status == "queued"
    done = within(
        "the response is done", lambda: (r := sdk.responses.retrieve(queued.id)).status == "completed" and r, 60
    )
    assert done.output_text == STAGE
    assert sdk.responses.cancel(queued.id).status == "completed"


# -- OpenAI: the rest ----------------------------------------------------------------------------------


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["demo"]
    assert sdk.models.retrieve("gpt-4o-mini").id == "demo"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("org/none")


def test_refusals_are_typed_errors(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="demo", messages=ASKED, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        sdk.embeddings.create(model="demo", input="hello")
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="none", messages=ASKED)


# -- Anthropic -----------------------------------------------------------------------------------------


def test_messages(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model="demo", max_tokens=60, extra_body=GREEDY, messages=ASKED)
    assert [block.text for block in message.content if block.type == "text"] == [STAGE]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 5


def test_messages_streamed(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="claude-demo", max_tokens=60, extra_body=GREEDY, messages=ASKED) as stream:
        assert "".join(stream.text_stream) == STAGE
        assert stream.get_final_message().stop_reason == "end_turn"
    raw = list(claude.messages.create(model="demo", max_tokens=6, messages=ASKED, stream=True))
    assert (raw[0].type, raw[-1].type) == ("message_start", "message_stop")


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    ],
)
def test_messages_with_tools(claude: anthropic.Anthropic, choice: Any) -> None:
    asked: Any = {"model": "demo", "max_tokens": 80, "messages": ASKED, "tools": [CLAUDE_TOOL], "tool_choice": choice}
    message = claude.messages.create(**asked)
    calls = [block for block in message.content if block.type == "tool_use"]
    for call in calls:
        jsonschema.validate(call.input, PARAMETERS)
    assert calls
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert all(block.type == "tool_use" for block in final.content)


def test_messages_structured(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(
        model="demo",
        max_tokens=80,
        messages=ASKED,
        output_config={"format": {"type": "json_schema", "schema": PARAMETERS}},
    )
    (block,) = message.content
    assert block.type == "text"
    jsonschema.validate(json.loads(block.text), PARAMETERS)


def test_beta_messages_counts_and_models(claude: anthropic.Anthropic) -> None:
    beta = claude.beta.messages.create(
        model="demo", max_tokens=60, extra_body=GREEDY, messages=ASKED, betas=["context-management-2025-06-27"]
    )
    assert beta.content[0].type == "text"
    counted = claude.messages.count_tokens(model="demo", messages=ASKED, tools=[CLAUDE_TOOL])
    assert counted.input_tokens > 10
    assert claude.beta.messages.count_tokens(model="demo", messages=ASKED).input_tokens < counted.input_tokens
    assert [model.id for model in claude.models.list()] == ["demo"]
    assert claude.models.retrieve("demo").type == "model"
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("none")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="demo", max_tokens=0, messages=ASKED)
