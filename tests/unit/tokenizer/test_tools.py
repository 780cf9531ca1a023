"""Tools as templates get them: as they are, as an instruction, or with the ids that a family insists on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mlx_cluster.tokenizer.tools import JSON_FORMAT, find_format, teach, with_short_ids

CALL: Any = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
HISTORY: list[Any] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0123456789", "content": "one"},
    {"role": "tool", "tool_call_id": "x", "content": "two"},
    {"role": "user", "content": "and?"},
]


def test_turns_still_alternate_after_results_became_text() -> None:
    told = teach(HISTORY, [{"type": "function", "function": {"name": "f"}}])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[2]["content"] == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert told[3]["content"].endswith("two\n</tool_response>\nand?")
    assert "tool_calls" not in told[2]


def test_without_tools_there_is_no_instruction() -> None:
    assert teach(HISTORY, [])[0] == HISTORY[0]


def test_short_ids_still_match() -> None:
    told = with_short_ids(HISTORY)
    short = told[1]["tool_calls"][0]["id"]
    assert len(short) == 9
    assert short.isalnum()
    assert told[2]["tool_call_id"] == short != told[3]["tool_call_id"]
    assert HISTORY[1]["tool_calls"][0]["id"] == "call_0123456789"


@pytest.mark.parametrize(
    "text", ["", "[]5", "7", '{"name": 5}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}']
)
def test_what_is_no_call_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"no tool call|Expecting"):
        JSON_FORMAT.parse(text, ())


@pytest.mark.parametrize("text", ["__import__('os').system('x')", "[f(a=b'x')]", "[f(a=1)"])
def test_python_that_is_no_call_is_a_value_error(text: str) -> None:
    format_ = find_format("{{ tools }}<|tool_call_start|>", ())
    assert format_ is not None
    with pytest.raises(ValueError, match="no tool call"):
        format_.parse(text, ())


def test_a_call_inside_of_a_call_stays_text() -> None:
    format_ = find_format("{{ tools }}<|tool_call_start|>", ())
    assert format_ is not None
    assert format_.parse("[f(a=open('/etc/passwd'))]", ())[0].arguments == """{"a": "open('/etc/passwd')"}"""


def test_the_parsers_bring_no_mlx() -> None:
    code = (
        "import sys; from mlx_cluster.tokenizer.tools import find_format; find_format('tools <arg_key>', ());"
        "sys.exit(any(name == 'mlx' or name.startswith(('mlx.', 'mlx_lm')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
