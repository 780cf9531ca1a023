"""Grammar masks on the last stage: what a constrained row may draw, beside rows that are not constrained."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_cluster.demo import model_dir
from mlx_cluster.errors import RowFailed
from mlx_cluster.microbatch import Kind, Microbatch, Outcome, RowSpec, Sampled
from mlx_cluster.model import sampling
from mlx_cluster.model.grammar import Grammars
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.model.sampling import Draw
from mlx_cluster.request import Grammar, Sampling
from tests.tiny_models import write_tiny_model

END = 2  # <|im_end|> of the demo model
WARM = Sampling(temperature=1.0, seed=7)


class Rows:
    """Speaks to one runner of a whole model as an engine does."""

    def __init__(self, runner: SliceRunner) -> None:
        self.runner = runner
        self.next_id = 0

    def submit(self, kind: Kind, rows: Sequence[int], tokens: Sequence[int], **values: Any) -> Outcome:
        self.next_id += 1
        header = Microbatch(self.next_id, kind, tuple(rows), tuple(tokens), sample=True, **values)
        return self.runner.submit(header, None).wait()

    def prefill(self, spec: RowSpec, prompt: Sequence[int]) -> Sampled:
        outcome = self.submit(Kind.PREFILL, [spec.row], prompt, admit=(spec,))
        assert not outcome.failed, outcome.failed
        return outcome.sampled[0]

    def generate(
        self, specs: Sequence[RowSpec], prompt: Sequence[int], most: int, end: int = END
    ) -> dict[int, list[Sampled]]:
        """Every row until it draws ``end`` (included) or has ``most`` tokens; finished rows leave the batch."""
        drawn = {spec.row: [self.prefill(spec, prompt)] for spec in specs}
        while True:
            live = [row for row, out in drawn.items() if out[-1].token_id != end and len(out) < most]
            if not live:
                break
            outcome = self.submit(Kind.DECODE, live, [drawn[row][-1].token_id for row in live])
            assert not outcome.failed, outcome.failed
            for one in outcome.sampled:
                drawn[one.row].append(one)
        self.runner.submit(Microbatch(0, Kind.CONTROL, release=tuple(drawn)), None).wait()
        return drawn


def ids(drawn: Sequence[Sampled]) -> list[int]:
    return [one.token_id for one in drawn]


def spec(row: int, grammar: Grammar | None, parameters: Sampling = WARM, **values: Any) -> RowSpec:
    return RowSpec(row, parameters, choice=row, grammar=grammar, stop_token_ids=(END, 0), **values)


@pytest.fixture(scope="module")
def demo() -> Rows:
    return Rows(SliceRunner.load(model_dir(), 0, 28, device="cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_dir())


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> list[int]:
    return list(tokenizer.encode("Answer with JSON.", add_special_tokens=False))


def text_of(tokenizer: Any, drawn: Sequence[Sampled]) -> str:
    return str(tokenizer.decode([token for token in ids(drawn) if token not in (END, 0)]))


# -- random schemas -----------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose texts are bounded, so that a tiny model at temperature 1 comes to an end."""
    kinds = ["string", "enum", "boolean", "integer", "null", "const"]
    kind = rng.choice(kinds if depth >= 2 else [*kinds, "object", "object", "array", "anyOf"])
    match kind:
        case "object":
            names = rng.sample(["name", "age", "città", "a b", "x", "tags"], rng.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }
        case "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 1}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
        case "string":
            low = rng.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 8)}
        case "enum":
            return {"enum": rng.sample(["red", "green", 'with "quotes"', "ä\n", 3, None, True], 3)}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
        case "const":
            return {"const": rng.choice(["fixed", 12, [1, 2], {"a": None}])}
    return {"type": kind}


def test_random_schemas_at_temperature_1_parse_and_validate(demo: Rows, tokenizer: Any, prompt: list[int]) -> None:
    rng = random.Random(20)
    schemas = [random_schema(rng) for _ in range(24)]
    stopped = 0
    for at in range(0, len(schemas), 8):
        specs = [
            spec(at + index, Grammar("json_schema", json.dumps(schema)))
            for index, schema in enumerate(schemas[at : at + 8])
        ]
        for row, drawn in demo.generate(specs, prompt, 160).items():
            if drawn[-1].token_id == END:
                stopped += 1
                jsonschema.validate(json.loads(text_of(tokenizer, drawn)), schemas[row])
    assert stopped >= 0.95 * len(schemas)


# -- other kinds, and neighbours ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "possible"),
    [
        (Grammar("choice", '["yes", "no", "may be"]'), {"yes", "no", "may be"}),
        (Grammar("regex", "a{2,3}|b"), {"aa", "aaa", "b"}),
        (Grammar("lark", 'start: "x" y\ny: "1" | "22"'), {"x1", "x22"}),
    ],
)
def test_every_choice_of_n_follows_its_grammar(
    demo: Rows, tokenizer: Any, prompt: list[int], grammar: Grammar, possible: set[str]
) -> None:
    drawn = demo.generate([spec(100 + row, grammar) for row in range(6)], prompt, 20)
    assert {text_of(tokenizer, row) for row in drawn.values()} <= possible
    assert all(row[-1].token_id in (END, 0) for row in drawn.values())


def test_a_neighbour_without_grammar_draws_what_it_draws_alone(demo: Rows, prompt: list[int]) -> None:
    free = spec(200, None, Sampling(temperature=1.0, seed=3, top_logprobs=2))
    alone = demo.generate([free], prompt, 12)[200]
    bound = [spec(row, Grammar("json_schema", '{"type": "array", "items": {"type": "integer"}}')) for row in (202, 203)]
    beside = demo.generate([bound[0], free_again := RowSpec(201, free.sampling, free.choice), bound[1]], prompt, 12)
    assert ids(beside[free_again.row]) == ids(alone)


def test_log_probabilities_are_those_of_the_raw_logits(demo: Rows, prompt: list[int]) -> None:
    parameters = Sampling(temperature=0.0, top_logprobs=3)
    free = demo.generate([spec(300, None, parameters)], prompt, 1)[300][0]
    bound = demo.generate([spec(301, Grammar("choice", '["zz"]'), parameters)], prompt, 1)[301][0]
    assert [token for token, _ in bound.top] == [token for token, _ in free.top]
    assert bound.logprob is not None
    assert bound.logprob < free.top[0][1]


def test_bias_cannot_bring_back_what_the_grammar_forbids(demo: Rows, tokenizer: Any, prompt: list[int]) -> None:
    forbidden = tokenizer.encode("q", add_special_tokens=False)[0]
    parameters = Sampling(
        temperature=1.0, logit_bias=((forbidden, 100.0), (END, 100.0)), presence_penalty=1.0, top_p=0.5
    )
    with_history = spec(310, Grammar("choice", '["yes"]'), parameters, history=tuple(prompt), prompt_length=len(prompt))
    assert text_of(tokenizer, demo.generate([with_history], prompt, 9)[310]) == "yes"


def test_a_resumed_row_goes_on_where_it_was(demo: Rows, tokenizer: Any, prompt: list[int]) -> None:
    grammar = Grammar(
        "json_schema", '{"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 3, "maxItems": 3}'
    )
    whole = ids(demo.generate([spec(400, grammar)], prompt, 60)[400])
    cut = len(whole) // 2
    resumed = RowSpec(
        401, WARM, choice=400, first_index=cut, history=tuple(whole[:cut]), grammar=grammar, stop_token_ids=(END, 0)
    )
    rest = demo.generate([resumed], [*prompt, *whole[:cut]], 60)[401]
    assert len(json.loads(tokenizer.decode([*whole[:cut], *ids(rest)[:-1]]))) == 3


# -- trouble ------------------------------------------------------------------------------------------


def test_a_grammar_that_cannot_be_compiled_fails_its_row_alone(demo: Rows, prompt: list[int]) -> None:
    demo.prefill(spec(500, Grammar("choice", '["yes"]')), prompt)
    bad = demo.submit(Kind.PREFILL, [501], prompt, admit=(spec(501, Grammar("regex", "a(b")),))
    assert not bad.sampled
    assert "cannot be compiled" in bad.failed[0].message
    token = demo.submit(Kind.DECODE, [500], tokenizer_ids("yes")[:1])
    assert not token.failed
    demo.runner.submit(Microbatch(0, Kind.CONTROL, release=(500, 501)), None).wait()


def test_a_token_against_the_grammar_fails_its_row_and_its_neighbour_goes_on(demo: Rows, prompt: list[int]) -> None:
    for row in (510, 511):
        demo.prefill(spec(row, Grammar("choice", '["yes"]')), prompt)
    outcome = demo.submit(Kind.DECODE, [510, 511], [tokenizer_ids("q")[0], tokenizer_ids("yes")[0]])
    assert [failure.row for failure in outcome.failed] == [510]
    assert [one.row for one in outcome.sampled] == [511]
    demo.runner.submit(Microbatch(0, Kind.CONTROL, release=(510, 511)), None).wait()


def tokenizer_ids(text: str) -> list[int]:
    return list(load_tokenizer(model_dir()).encode(text, add_special_tokens=False))


def test_a_row_without_stop_tokens_fails_when_its_grammar_is_complete() -> None:
    row = Grammars(model_dir(), 1536).begin(Grammar("choice", '["yes"]'), tokenizer_ids("yes"), ())
    with pytest.raises(RowFailed, match="no stop token"):
        row.mask()


def test_stop_tokens_are_allowed_exactly_where_the_grammar_may_end() -> None:
    grammars = Grammars(model_dir(), 1536)

    def allowed(emitted: str) -> list[int]:
        row = grammars.begin(Grammar("regex", "a{2,3}"), tokenizer_ids(emitted), (END,))
        return np.flatnonzero(np.unpackbits(row.mask().view(np.uint8), bitorder="little")).tolist()

    assert END not in allowed("a")
    assert END in allowed("aa")
    assert 0 not in allowed("aa")  # ends a text as well, but this request does not stop there
    assert allowed("aaa") == [END]


def test_a_directory_without_tokenizer_fails_the_row_by_name(tmp_path: Path) -> None:
    with pytest.raises(RowFailed, match=r"tokenizer\.json"):
        Grammars(tmp_path, 300).begin(Grammar("choice", '["a"]'), (), (1,)).mask()


def test_masks_reach_logits_wider_and_narrower_than_the_tokenizer(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "tiny", layers=1, width=32, vocab=300)
    wide = Grammars(directory, 320).begin(Grammar("regex", "[0-9]+"), (), (256,)).mask()
    assert wide.size == 10
    logits = mx.zeros((2, 320))
    draws = [Draw(Sampling(temperature=1.0, seed=seed), 0, 0) for seed in range(2)]
    drawn = sampling.sample(logits, draws, sampling.limits({1: wide, 0: wide[:9]}, logits.shape[-1]))
    allowed = set(np.flatnonzero(np.unpackbits(wide.view(np.uint8), bitorder="little")).tolist())
    assert len(allowed) == 10
    assert {int(token) for token in np.array(drawn.tokens)} <= allowed


def test_masks_of_several_rows_are_those_of_each_one() -> None:
    grammars = Grammars(model_dir(), 1536)
    patterns = [Grammar("regex", pattern) for pattern in ("[a-z]+ b", "x{40}", "[0-9]{6}")]
    rows = [grammars.begin(pattern, (), (END,)) for pattern in patterns]
    broken = grammars.begin(Grammar("lark", "start: nowhere"), (), (END,))
    for _ in range(3):
        together = grammars.masks([*rows, broken])
        assert isinstance(together[-1], RowFailed)
        for row, mask in zip(rows, together, strict=False):
            assert not isinstance(mask, RowFailed)
            assert np.array_equal(mask, row.mask())
            word = int(np.flatnonzero(mask)[0])
            row.consume(32 * word + next(bit for bit in range(32) if int(mask[word]) >> bit & 1))
