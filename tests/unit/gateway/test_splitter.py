"""Reasoning and calls in a stream: the same parts however the text is cut; what is no call stays text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count

import pytest

from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.parts import CallEnd, Part, calls_of, reasoning_of, text_of
from mlx_cluster.gateway.splitter import Shape, Splitter
from mlx_cluster.request import Token
from mlx_cluster.tokenizer.reasoning import Markers, find_markers
from mlx_cluster.tokenizer.tools import JSON_FORMAT, find_format

THINK = Markers("<think>", "</think>")
BOTH = Shape(reasoning=THINK, format=JSON_FORMAT)
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Par}is", "n": [1, {"a": "\\""}]}}\n</tool_call>'


def cuts(text: str, seed: int) -> Iterator[Piece]:
    """Pieces of one to five characters, each with a token, and some empty ones."""
    rng, at = random.Random(seed), 0
    for index in count():
        if at >= len(text):
            return
        width = rng.randint(0, 5)
        yield Piece(text[at : at + width], Token(index, index))
        at += width


def split(shape: Shape, pieces: Sequence[Piece] | Iterator[Piece]) -> list[Part]:
    ids = (f"call_{number}" for number in count())
    splitter = Splitter(shape, lambda: next(ids))
    parts: list[Part] = []
    for piece in pieces:
        parts += splitter.push(piece)
    return parts + splitter.finish()


def told(parts: Sequence[Part]) -> tuple[str, str, list[tuple[str, str]]]:
    return reasoning_of(parts), text_of(parts), [(call.name, call.arguments) for call in calls_of(parts)]


CASES = [
    ("just text < with > signs", ("", "just text < with > signs", [])),
    ("  leading space stays", ("", "  leading space stays", [])),
    ("<think>\nhm, </thi\n</think>\n\nAnswer", ("hm, </thi\n", "Answer", [])),
    ("\n<think></think>Answer", ("", "Answer", [])),
    ("Use <think> like so", ("", "Use <think> like so", [])),
    ("<think>never ends", ("never ends", "", [])),
    (WEATHER, ("", "", [("weather", '{"city": "Par}is", "n": [1, {"a": "\\""}]}')])),
    (
        f"<think>a</think>Look:\n{WEATHER}\n{WEATHER}\n",
        ("a", "Look:\n", [("weather", '{"city": "Par}is", "n": [1, {"a": "\\""}]}')] * 2),
    ),
    ('<tool_call>{"arguments": {}, "name": "f"}</tool_call> done', ("", " done", [("f", "{}")])),
    ('<tool_call>{"name": "f", "arguments": {}}', ("", "", [("f", "{}")])),
    ("<tool_call>no JSON</tool_call>!", ("", "<tool_call>no JSON</tool_call>!", [])),
    ("<tool_call>cut off", ("", "<tool_call>cut off", [])),
    ("ends with <tool_c", ("", "ends with <tool_c", [])),
]


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[text[:24] for text, _ in CASES])
def test_parts_do_not_depend_on_the_cuts(text: str, expected: tuple[str, str, list[tuple[str, str]]]) -> None:
    for seed in range(30):
        assert told(split(BOTH, cuts(text, seed))) == expected


def test_a_prompt_that_opened_the_reasoning_begins_inside() -> None:
    shape = Shape(reasoning=THINK, begins_in_reasoning=True)
    assert told(split(shape, cuts("\nhm</think>\nyes", 1))) == ("hm", "yes", [])


def test_text_is_shown_at_once_when_no_marker_can_begin_there() -> None:
    splitter = Splitter(BOTH, lambda: "id")
    assert splitter.push(Piece("Hello", None)) == [Piece("Hello", None)]
    assert splitter.push(Piece(" <", None)) == [Piece(" ", None)]
    assert splitter.push(Piece("b>", None)) == [Piece("<", None), Piece("b>", None)]


def test_arguments_come_as_they_are_written() -> None:
    ids = iter(["call_a"])
    splitter = Splitter(BOTH, lambda: next(ids))
    begun = splitter.push(Piece('<tool_call>{"name": "f", "arguments": {"a', None))
    assert [type(part).__name__ for part in begun] == ["CallStart", "CallArguments"]
    assert told(begun)[2] == [("f", '{"a')]
    assert told(begun + splitter.push(Piece('": 1}', None)))[2] == [("f", '{"a": 1}')]


def test_a_call_that_is_cut_has_no_end() -> None:
    parts = split(BOTH, [Piece('<tool_call>{"name": "f", "arguments": {"a": ', None)])
    assert not any(isinstance(part, CallEnd) for part in parts)


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    shape = Shape(format=JSON_FORMAT, parallel=False)
    splitter = Splitter(shape, lambda: "id")
    parts = [part for piece in cuts(WEATHER + WEATHER, 3) for part in splitter.push(piece)]
    assert splitter.done
    assert len(calls_of(parts)) == 1


def test_every_token_of_the_text_keeps_its_place() -> None:
    text = "Look: <tool_call>nothing</tool_call> here"
    pieces = list(cuts(text, 5))
    shown = [part.token for part in split(BOTH, pieces) if isinstance(part, Piece) and part.token is not None]
    assert shown == [piece.token for piece in pieces]


# -- families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text", "call"),
    [
        (
            "{{ tools }} <tool_call>\n<function=",
            "<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n</function>\n</tool_call>",
            ("f", '{"a": "b"}'),
        ),
        ("{{ tools }} [TOOL_CALLS]", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "b"}}]', ("f", '{"a": "b"}')),
        ("{{ tools }} <|tool_call_start|>", '<|tool_call_start|>[f(a="b")]<|tool_call_end|>', ("f", '{"a": "b"}')),
        (
            "{{ tools }} <tool_call> tool_call.name",
            '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>',
            ("f", '{"a": "b"}'),
        ),
    ],
)
def test_families_write_calls_in_their_own_format(template: str, text: str, call: tuple[str, str]) -> None:
    format_ = find_format(template, ())
    assert format_ is not None
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]
    for seed in range(10):
        assert told(split(Shape(format=format_, tools=tools), cuts(text, seed)))[2] == [call]


def test_a_template_without_tools_has_no_format() -> None:
    assert find_format("<tool_call>", ()) is None
    assert find_format("{{ tools }}", ()) is None
    assert find_markers("{{ x }}", ()) is None
    assert find_markers("", {"<think>", "</think>"}) == THINK
    assert THINK.opened_by("hi\nassistant\n<think>\n")
    assert not THINK.opened_by("<think>\n\n</think>\n\n")
