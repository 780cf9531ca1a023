"""Verification blocks: whatever is drafted, accepted and taken back, a row's tokens are those of plain decoding."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import pytest

from mlx_cluster.demo import model_dir
from mlx_cluster.microbatch import Frame, Kind, Load, Microbatch, Outcome, RowSpec, Sampled, Store, Trim
from mlx_cluster.model.quantized_cache import KvFormat
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Grammar, Sampling
from tests.tiny_models import write_tiny_model

VOCAB = 300
COUNT = 24
GREEDY = Sampling(temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "warm": Sampling(temperature=1.2, seed=4, top_p=0.9),
    "penalties": Sampling(
        temperature=0.7, seed=9, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4, top_k=40
    ),
    "greedy with penalties": Sampling(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.3),
    "logprobs": Sampling(temperature=1.0, seed=2, top_logprobs=3, logit_bias=((5, 2.0),)),
}


class Stages:
    """Runners one after the other, told what an engine tells them; the drafts are the caller's."""

    def __init__(self, model: Path, split: Sequence[int], kv: KvFormat | None = None) -> None:
        bounds = [sum(split[:index]) for index in range(len(split) + 1)]
        self.runners = [SliceRunner.load(model, *cut, device="cpu", kv=kv) for cut in pairwise(bounds)]
        self.next_id = 0
        self.positions: dict[int, int] = {}
        self.trims: list[Trim] = []

    def submit(self, kind: Kind, rows: Sequence[int], tokens: Sequence[int], **values: Any) -> Outcome:
        self.next_id += 1
        trims, self.trims = tuple(self.trims), []
        header = Microbatch(self.next_id, kind, tuple(rows), tuple(tokens), sample=True, trim=trims, **values)
        frame: Frame | None = None
        for runner in self.runners:
            outcome = runner.submit(header, frame).wait()
            frame = outcome.frame
        assert not outcome.failed, outcome.failed
        return outcome

    def prefill(self, spec: RowSpec, prompt: Sequence[int], **values: Any) -> Sampled:
        self.positions[spec.row] = len(prompt)
        return self.submit(Kind.PREFILL, [spec.row], prompt, admit=(spec,), **values).sampled[0]

    def decode(self, rows: Sequence[int], tokens: Sequence[int], group: int = 0) -> dict[int, Sampled]:
        for row in rows:
            self.positions[row] += 1
        return {s.row: s for s in self.submit(Kind.DECODE, rows, tokens, group=group).sampled}

    def verify(
        self, rows: Sequence[int], last: Sequence[int], drafts: Sequence[Sequence[int]], group: int = 0
    ) -> dict[int, list[Sampled]]:
        """What every row says; the positions of what it does not say are taken back with the next header."""
        tokens = [token for one, draft in zip(last, drafts, strict=True) for token in (one, *draft)]
        lengths = tuple(1 + len(draft) for draft in drafts)
        out = self.submit(Kind.VERIFY, rows, tokens, group=group, lengths=lengths if len(rows) > 1 else ())
        said: dict[int, list[Sampled]] = {row: [s for s in out.sampled if s.row == row] for row in rows}
        for row, draft in zip(rows, drafts, strict=True):
            assert [s.token_id for s in said[row][:-1]] == list(draft[: len(said[row]) - 1])
            self.positions[row] += len(said[row])
            if len(said[row]) <= len(draft):
                self.trims.append(Trim(row, self.positions[row]))
        return said


def spec_of(row: int, sampling: Sampling, prompt: Sequence[int], **values: Any) -> RowSpec:
    if sampling.needs_history:
        values |= {"prompt_length": len(prompt), "history": tuple(prompt)}
    return RowSpec(row, sampling, row, **values)


def plain(stages: Stages, spec: RowSpec, prompt: Sequence[int], count: int = COUNT) -> list[Sampled]:
    said = [stages.prefill(spec, prompt)]
    while len(said) < count:
        said.append(stages.decode([spec.row], [said[-1].token_id])[spec.row])
    stages.submit(Kind.CONTROL, [], [], release=(spec.row,))
    return said


def drafted(
    stages: Stages, spec: RowSpec, prompt: Sequence[int], expected: Sequence[int], seed: int, count: int = COUNT
) -> list[Sampled]:
    """Drafts of all lengths, right up to some token; now and then a plain step between."""
    dice = random.Random(seed)
    said = [stages.prefill(spec, prompt)]
    while len(said) < count:
        last = said[-1].token_id
        if dice.random() < 0.2:
            said.append(stages.decode([spec.row], [last])[spec.row])
            continue
        draft = list(expected[len(said) : len(said) + dice.randint(1, 5)])
        if draft and dice.random() < 0.6:
            wrong = dice.randrange(len(draft))
            draft[wrong] = (draft[wrong] + 1 + dice.randrange(VOCAB - 2)) % VOCAB
        said += stages.verify([spec.row], [last], [draft])[spec.row]
    stages.submit(Kind.CONTROL, [], [], release=(spec.row,))
    return said[:count]


def ids(said: Sequence[Sampled]) -> list[int]:
    return [one.token_id for one in said]


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "small"
    return write_tiny_model(path, layers=4, width=32, vocab=VOCAB, family="qwen2/untied")


def prompt_of(seed: int, length: int = 9) -> list[int]:
    return mx.random.randint(0, VOCAB, (length,), key=mx.random.key(seed)).tolist()  # type: ignore[return-value]


@pytest.mark.parametrize("split", [[4], [2, 2], [1, 2, 1]], ids=str)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_drafts_leave_no_trace(small_dir: Path, split: list[int], name: str) -> None:
    stages = Stages(small_dir, split)
    for seed in range(4):
        prompt = prompt_of(seed)
        expected = plain(stages, spec_of(2 * seed, SAMPLINGS[name], prompt), prompt)
        spec = replace(spec_of(2 * seed + 1, SAMPLINGS[name], prompt), choice=2 * seed)
        got = drafted(stages, spec, prompt, ids(expected), seed)
        assert ids(got) == ids(expected)
        for mine, theirs in zip(got, expected, strict=True):
            assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]
            assert mine.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-4))
    assert all(runner.num_rows == 0 and runner.cache_bytes == 0 for runner in stages.runners)


@pytest.mark.parametrize("bits", [8, 4])
def test_drafts_leave_no_trace_in_quantized_keys_and_values(tmp_path: Path, bits: Literal[4, 8]) -> None:
    model = write_tiny_model(tmp_path / "wide", layers=2, width=128, vocab=VOCAB, family="qwen2/untied")
    stages = Stages(model, [1, 1], KvFormat(bits, 32))
    prompt = prompt_of(5)
    expected = ids(plain(stages, spec_of(0, GREEDY, prompt), prompt))
    assert ids(drafted(stages, spec_of(1, GREEDY, prompt), prompt, expected, 3)) == expected


def test_rows_verify_beside_each_other_and_join_a_batch_again(small_dir: Path) -> None:
    """Three rows as one batch, then drafts of unequal length on each one's own caches, then a batch again."""
    prompts = [prompt_of(seed, 6 + seed) for seed in range(3)]
    alone = Stages(small_dir, [4])
    expected = [ids(plain(alone, RowSpec(row, GREEDY, 0), prompt)) for row, prompt in enumerate(prompts)]
    stages = Stages(small_dir, [1, 3])
    said = [[stages.prefill(RowSpec(row, GREEDY, 0), prompt).token_id] for row, prompt in enumerate(prompts)]
    dice = random.Random(1)
    for step in range(7):
        last = [tokens[-1] for tokens in said]
        if step % 3 == 0:
            for row, one in stages.decode(range(3), last).items():
                said[row].append(one.token_id)
            continue
        drafts = [expected[row][len(said[row]) :][: row + 1] for row in range(3)]
        for draft in drafts:
            if dice.random() < 0.5:
                draft[-1] = (draft[-1] + 7) % VOCAB
        for row, more in stages.verify(range(3), last, drafts).items():
            said[row] += ids(more)
    for row in range(3):
        count = min(len(said[row]), COUNT)
        assert said[row][:count] == expected[row][:count]
    assert sum(map(len, said)) > 3 * 8


def test_an_entry_of_the_prefix_cache_never_holds_rejected_positions(small_dir: Path) -> None:
    """Trim and store in one header; another row that begins with the entry says what the first would say."""
    stages = Stages(small_dir, [2, 2])
    prompt = prompt_of(3)
    expected = ids(plain(stages, RowSpec(0, GREEDY, 0), prompt))
    first = stages.prefill(RowSpec(1, GREEDY, 0), prompt)
    (said,) = stages.verify([1], [first.token_id], [[expected[1], expected[2] ^ 1, 7, 8]]).values()
    assert ids(said) == expected[1:3]
    whole = [*prompt, *expected[:2]]  # the last token said was never computed
    stages.submit(Kind.CONTROL, [], [], store=(Store(1, 5),), release=(1,))
    load = Load(2, 5, len(whole))
    stages.positions[2] = len(whole)
    out = stages.submit(Kind.PREFILL, [2], [expected[2]], admit=(RowSpec(2, GREEDY, 0),), load=(load,))
    stages.positions[2] += 1
    got = [out.sampled[0].token_id]
    while len(got) < 8:
        got.append(stages.decode([2], [got[-1]])[2].token_id)
    assert got == expected[3 : 3 + len(got)]


def test_a_row_that_remembers_what_it_said_takes_back_drafts_alone(small_dir: Path) -> None:
    """When its header asks for more it fails by name; the others go on."""
    stages = Stages(small_dir, [4])
    prompt = prompt_of(1)
    first = stages.prefill(spec_of(0, SAMPLINGS["penalties"], prompt), prompt)
    trim = (Trim(0, len(prompt) - 1),)
    header = Microbatch(50, Kind.DECODE, (0,), (first.token_id,), sample=True, trim=trim)
    outcome = stages.runners[0].submit(header, None).wait()
    assert "cannot be cut to 8" in outcome.failed[0].message
    # One that is not known here, or gone already, is nobody's business.
    gone = Microbatch(51, Kind.CONTROL, trim=(Trim(77, 3),), release=(0,))
    assert stages.runners[0].submit(gone, None).wait() == Outcome()


def test_any_other_row_can_be_cut_anywhere(small_dir: Path) -> None:
    """As a small model's rows are that went on by themselves and guessed wrong."""
    stages = Stages(small_dir, [2, 2])
    prompt = prompt_of(2)
    said = ids(plain(stages, RowSpec(0, GREEDY, 0), prompt))
    stages.prefill(RowSpec(1, GREEDY, 0), prompt)
    for token in (7, 8, 9):  # steps of a batch of one, none of them right
        stages.decode([1], [token])
    stages.trims.append(Trim(1, len(prompt)))
    stages.positions[1] = len(prompt)
    got = [stages.submit(Kind.PREFILL, [1], said[:1]).sampled[0].token_id]
    while len(got) < 6:
        got.append(stages.decode([1], [got[-1]])[1].token_id)
    assert got == said[1:7]


def test_layers_that_cannot_be_cut_refuse_drafts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "window", layers=3, width=32, vocab=VOCAB, family="gemma3_text")
    stages = Stages(model, [3])
    first = stages.prefill(RowSpec(0, GREEDY, 0), prompt_of(1))
    header = Microbatch(50, Kind.VERIFY, (0,), (first.token_id, 1), sample=True)
    outcome = stages.runners[0].submit(header, None).wait()
    assert "cannot be cut" in outcome.failed[0].message
    assert not stages.runners[0].can_trim


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
ENDS = (2, 0)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=5)], ids=["greedy", "warm"])
def test_a_grammar_goes_along_with_the_draft_and_back(sampling: Sampling) -> None:
    """Constrained rows: right drafts, drafts that the grammar forbids, drafts that it allows and the draw does not."""
    stages = Stages(model_dir(), [28])
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    prompt = [40, 50, 60, 70]

    def until_end(said: list[Sampled]) -> list[int]:
        tokens = ids(said)
        ends = [at for at, token in enumerate(tokens) if token in ENDS]
        return tokens[: ends[0] + 1] if ends else tokens

    def spec(row: int) -> RowSpec:
        return RowSpec(row, sampling, 0, grammar=grammar, stop_token_ids=ENDS)

    said = [stages.prefill(spec(0), prompt)]
    while said[-1].token_id not in ENDS and len(said) < 60:
        said.append(stages.decode([0], [said[-1].token_id])[0])
    expected = until_end(said)
    for seed in range(3):
        dice = random.Random(seed)
        row = 1 + seed
        said = [stages.prefill(spec(row), prompt)]
        num_blocks = 0
        while said[-1].token_id not in ENDS and len(said) < len(expected):
            draft = [token for token in expected[len(said) : len(said) + 4] if token not in ENDS]
            if draft and dice.random() < 0.6:
                draft[dice.randrange(len(draft))] = dice.randrange(3, 500)
            said += stages.verify([row], [said[-1].token_id], [draft])[row]
            num_blocks += 1
        assert until_end(said)[: len(expected)] == expected
        assert num_blocks < len(expected) - 1
