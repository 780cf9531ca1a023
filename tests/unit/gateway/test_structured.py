"""Composed grammars, by what they let through: reasoning first, then the format or calls, as a splitter reads them."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast

from mlx_cluster.errors import RowFailed
from mlx_cluster.gateway.ask import Tool, ToolUse
from mlx_cluster.gateway.choice import Piece
from mlx_cluster.gateway.parts import calls_of, reasoning_of, text_of
from mlx_cluster.gateway.splitter import Shape, Splitter
from mlx_cluster.gateway.structured import MAX_PARALLEL_CALLS, compose
from mlx_cluster.model.grammar import Grammars
from mlx_cluster.request import Grammar
from mlx_cluster.tokenizer import Tokenizer, load
from mlx_cluster.tokenizer.reasoning import Markers
from mlx_cluster.tokenizer.tools import JSON_FORMAT
from tests.fake_engine import write_byte_level_tokenizer

THINK = Markers("<think>", "</think>")
SPECIAL = Markers("[THINK]", "[/THINK]")
OBJECT = Grammar(
    "json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": false}'
)
CITY = {
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", 'Köln "am" Rhein']}},
}
# after three special tokens and 256 bytes
SPECIAL_IDS = {SPECIAL.start: 259, SPECIAL.end: 260}
TOOLS = (Tool("weather", parameters=CITY), Tool("clock"))
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_byte_level_tokenizer(tmp_path_factory.mktemp("structured"))
    inner = Fast.from_file(str(made / "tokenizer.json"))
    inner.add_special_tokens([AddedToken(name, special=True) for name in (SPECIAL.start, SPECIAL.end)])
    inner.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load(directory)


@pytest.fixture(scope="module")
def grammars(directory: Path, tokenizer: Tokenizer) -> Grammars:
    return Grammars(directory, tokenizer.vocab_size)


def lets_through(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar | None, text: str) -> bool:
    """Whether ``text`` is a whole answer under the grammar: every token is allowed, and then the end."""
    assert grammar is not None
    (end,) = tokenizer.eos_token_ids
    row = grammars.begin(grammar, (), (end,))
    assert row.mask().any()  # it compiles
    for token in tokenizer.encode(text):
        try:
            row.consume(token)
        except RowFailed:
            return False
    return bool(row.mask()[end // 32] >> (end % 32) & 1)


def made(
    main: Grammar | None,
    use: ToolUse | None,
    reasoning: Markers | None = None,
    *,
    opened: bool = False,
) -> Grammar | None:
    return compose(main, use, reasoning, opened=opened, special_id=SPECIAL_IDS.get)


@pytest.mark.parametrize("markers", [THINK, SPECIAL], ids=["text", "special"])
@pytest.mark.parametrize(
    ("main", "body"), [(OBJECT, '{"a": 1}'), (Grammar("regex", "[0-9]+"), "12"), (Grammar("choice", '["yes"]'), "yes")]
)
def test_reasoning_may_come_first(
    grammars: Grammars, tokenizer: Tokenizer, markers: Markers, main: Grammar, body: str
) -> None:
    opened, closed = made(main, None, markers, opened=True), made(main, None, markers)
    thought = f'so: {{"a"\n< {markers.end}'
    for text in (thought + body, f"{thought}\n\n{body}"):
        assert lets_through(grammars, tokenizer, opened, text)
        assert lets_through(grammars, tokenizer, closed, markers.start + text)
    assert lets_through(grammars, tokenizer, closed, body)
    assert not lets_through(grammars, tokenizer, opened, body)
    assert not lets_through(grammars, tokenizer, opened, f"{thought}\n\nno {body}")


@pytest.mark.parametrize(
    ("use", "good", "bad"),
    [
        (
            ToolUse(TOOLS, "required"),
            [ROME, CLOCK, f"{ROME}\n{CLOCK}"],
            ["", "hello", f"{ROME}{CLOCK}", ROME.replace("Rome", "Oslo")],
        ),
        (ToolUse(TOOLS, "required", only="clock"), [CLOCK, f"{CLOCK}\n{CLOCK}"], [ROME]),
        (ToolUse(TOOLS, "required", parallel=False), [ROME], [f"{ROME}\n{CLOCK}"]),
    ],
    ids=["required", "named", "one"],
)
def test_calls(grammars: Grammars, tokenizer: Tokenizer, use: ToolUse, good: list[str], bad: list[str]) -> None:
    grammar = made(None, use)
    assert [text for text in good if not lets_through(grammars, tokenizer, grammar, text)] == []
    assert [text for text in bad if lets_through(grammars, tokenizer, grammar, text)] == []


def test_the_number_of_calls_is_bounded(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = made(None, ToolUse(TOOLS, "required"))
    assert lets_through(grammars, tokenizer, grammar, "\n".join([CLOCK] * MAX_PARALLEL_CALLS))
    assert not lets_through(grammars, tokenizer, grammar, "\n".join([CLOCK] * (MAX_PARALLEL_CALLS + 1)))


def test_a_format_or_calls(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = made(OBJECT, ToolUse(TOOLS), THINK)
    for text in ("{}", ROME, f"<think>hm</think>{ROME}", "<think>hm</think>\n{}"):
        assert lets_through(grammars, tokenizer, grammar, text)
    assert not lets_through(grammars, tokenizer, grammar, "{}" + ROME)


def test_what_it_lets_through_is_read_back(grammars: Grammars, tokenizer: Tokenizer) -> None:
    köln = ROME.replace('"Rome"', json.dumps('Köln "am" Rhein', ensure_ascii=False))
    text = f"<think>hm</think>\n\n{köln}\n{CLOCK}"
    assert lets_through(grammars, tokenizer, made(None, ToolUse(TOOLS, "required"), THINK), text)
    ids = count()
    splitter = Splitter(Shape(reasoning=THINK, format=JSON_FORMAT), lambda: str(next(ids)))
    parts = [part for char in text for part in splitter.push(Piece(char, None))] + splitter.finish()
    assert (reasoning_of(parts), text_of(parts)) == ("hm", "")
    assert [(call.name, json.loads(call.arguments)) for call in calls_of(parts)] == [
        ("weather", {"city": 'Köln "am" Rhein'}),
        ("clock", {}),
    ]


def test_nothing_bound_is_no_grammar_and_a_format_alone_stays_itself() -> None:
    assert made(None, None, THINK) is None
    assert made(OBJECT, None) is OBJECT
