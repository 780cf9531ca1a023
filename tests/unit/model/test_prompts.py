"""Several prompts in one microbatch, and rows that begin with an entry: tokens stay those of each prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_cluster.errors import LinkMismatch
from mlx_cluster.microbatch import Frame, Kind, Load, Microbatch, Outcome, RowSpec, Store
from mlx_cluster.model import prompts
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.model.slice import ModelSlice
from mlx_cluster.request import Sampling
from tests.tiny_models import build_tiny, write_tiny_model

VOCAB = 320
LAYERS = 4
GREEDY = Sampling(temperature=0.0, top_logprobs=1)
# Attention, sliding windows shorter than some prompts, recurrent states that know padding, and some that do not.
FAMILIES = ("qwen2", "llama/sliding", "gemma3_text", "qwen3_next", "jamba", "gemma2")
SHARING = {"qwen2", "llama/sliding", "gemma3_text", "qwen3_next"}
# Cuts that leave slices with one kind of cache, and so with stand-ins for the other.
SPLITS = ([4], [1, 2, 1])


@dataclass
class Chain:
    """Runners one after the other, spoken to in headers; remembers every stage's outcomes of the last one."""

    runners: list[SliceRunner]
    outcomes: list[Outcome] = field(default_factory=list)

    @classmethod
    def load(cls, model_dir: Path, split: Sequence[int]) -> Chain:
        bounds = [sum(split[:index]) for index in range(len(split) + 1)]
        return cls([SliceRunner.load(model_dir, start, end, device="cpu") for start, end in pairwise(bounds)])

    def submit(self, header: Microbatch) -> dict[int, int]:
        """The tokens that were drawn, by row."""
        frame: Frame | None = None
        self.outcomes = []
        for runner in self.runners:
            self.outcomes.append(runner.submit(header, frame).wait())
            frame = self.outcomes[-1].frame
        assert not any(outcome.failed for outcome in self.outcomes)
        return {s.row: s.token_id for s in self.outcomes[-1].sampled}

    def decode(self, rows: dict[int, list[int]], count: int, group: int = 0) -> None:
        """Let the rows, which end with the token drawn last, draw ``count`` more as one group."""
        for _ in range(count):
            last = tuple(tokens[-1] for tokens in rows.values())
            drawn = self.submit(Microbatch(1, Kind.DECODE, tuple(rows), last, group, sample=True))
            for row, token in drawn.items():
                rows[row].append(token)

    def release(self, *rows: int, store: tuple[Store, ...] = (), evict: tuple[int, ...] = ()) -> None:
        self.submit(Microbatch(1, Kind.CONTROL, release=rows, store=store, evict=evict))

    @property
    def missing(self) -> list[tuple[int, ...]]:
        return [outcome.missing for outcome in self.outcomes]


def prefill(*texts: Sequence[int], first: int = 0, sample: bool = True, **more: object) -> Microbatch:
    """Prompts in one microbatch, for rows from ``first`` on."""
    rows = tuple(range(first, first + len(texts)))
    return Microbatch(
        1,
        Kind.PREFILL,
        rows,
        tuple(token for text in texts for token in text),
        sample=sample,
        admit=tuple(RowSpec(row, GREEDY, 0) for row in rows),
        lengths=tuple(map(len, texts)) if len(texts) > 1 else (),
        **more,  # type: ignore[arg-type]
    )


def some_prompts(*lengths: int) -> list[list[int]]:
    return [
        mx.random.randint(0, VOCAB, (length,), key=mx.random.key(length)).tolist()  # type: ignore[misc]
        for length in lengths
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        family: write_tiny_model(folder / family.replace("/", "-"), layers=LAYERS, width=64, vocab=VOCAB, family=family)
        for family in FAMILIES
    }


def greedy(model_dir: Path, prompt: Sequence[int], count: int) -> list[int]:
    """What mlx-lm alone generates."""
    model, _ = load_model(model_dir)
    return [int(token) for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=count)]


# -- several prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_together_give_the_tokens_of_each_alone(models: dict[str, Path], family: str, split: list[int]) -> None:
    """Together, then as one group that a row leaves; one prompt goes on in a second chunk of its own."""
    texts = some_prompts(3, 11, 1, 7)
    expected = [greedy(models[family], text, 6) for text in texts]
    chain = Chain.load(models[family], split)
    assert {runner._shares_prompts for runner in chain.runners} == {family in SHARING}
    rows = {row: [token] for row, token in chain.submit(prefill(*texts)).items()}
    chain.decode(rows, 3)
    left = rows.pop(1)
    chain.decode(rows, 2)
    chain.decode({1: left}, 2, group=1)
    assert [rows.get(row, left) for row in range(4)] == expected

    head, tail = texts[1][:6], texts[1][6:]
    chain.submit(prefill(texts[0], head, first=10, sample=False))
    drawn = chain.submit(Microbatch(1, Kind.PREFILL, (11,), tuple(tail), sample=True))
    assert drawn == {11: expected[1][0]}


@pytest.mark.parametrize(
    ("family", "dtype", "expected"),
    [
        ("qwen3_next", "float32", True),
        ("lfm2", "bfloat16", True),
        ("mamba", "float32", False),
        ("mamba", "bfloat16", False),
        ("rwkv7", "float32", False),
    ],
)
def test_a_slice_is_tried_before_its_prompts_are_padded(family: str, dtype: str, expected: bool) -> None:
    """mamba's and rwkv7's files let padding into their states; mamba's by less than what bfloat16 rounds away."""
    for start, end in ((0, 2), (2, 4)):
        model = build_tiny(family, layers=LAYERS, vocab=VOCAB)
        model.set_dtype(getattr(mx, dtype))
        part = ModelSlice(model, start, end)
        assert part.can_batch
        assert prompts.is_exact(part) is expected


def test_a_hidden_state_of_several_prompts_is_as_wide_as_the_longest(models: dict[str, Path]) -> None:
    for family in ("qwen2", "gemma2"):
        chain = Chain.load(models[family], [2, 2])
        chain.submit(prefill(*some_prompts(2, 5)))
        frame = chain.outcomes[0].frame
        assert frame is not None
        assert frame.tensors[0].shape == (2, 5, 64)


def test_a_bad_prompt_among_several_fails_alone(models: dict[str, Path]) -> None:
    texts = some_prompts(4, 3, 6)
    expected = [greedy(models["qwen2"], text, 1)[0] for text in texts]
    front, back = Chain.load(models["qwen2"], [2, 2]).runners
    header = prefill(texts[0], [1, VOCAB, 2], texts[2])
    first = front.submit(header, None).wait()
    second = back.submit(header, first.frame).wait()
    assert [[failed.row for failed in outcome.failed] for outcome in (first, second)] == [[1], [1]]
    assert [(s.row, s.token_id) for s in second.sampled] == [(0, expected[0]), (2, expected[2])]


def test_a_row_that_has_a_cache_may_share_a_microbatch(models: dict[str, Path]) -> None:
    """It runs by itself beside the fresh ones, and the tokens keep their rows."""
    texts = some_prompts(9, 4, 5)
    expected = [greedy(models["qwen2"], text, 3) for text in texts]
    chain = Chain.load(models["qwen2"], [2, 2])
    chain.submit(prefill(texts[0][:5], sample=False))
    tokens = (*texts[0][5:], *texts[1], *texts[2])
    admit = (RowSpec(1, GREEDY, 0), RowSpec(2, GREEDY, 0))
    header = Microbatch(1, Kind.PREFILL, (0, 1, 2), tokens, sample=True, admit=admit, lengths=(4, 4, 5))
    rows = {row: [token] for row, token in sorted(chain.submit(header).items())}
    chain.decode(rows, 2)
    assert list(rows.values()) == expected


@pytest.mark.parametrize("lengths", [(2,), (2, 2), (4, 0, 1)])
def test_a_header_that_contradicts_itself_is_refused(models: dict[str, Path], lengths: tuple[int, ...]) -> None:
    runner = SliceRunner.load(models["qwen2"], 0, 4, device="cpu")
    with pytest.raises(LinkMismatch, match="5 tokens"):
        runner.submit(Microbatch(1, Kind.PREFILL, (1, 2), (1, 2, 3, 4, 5), lengths=lengths), None)


# -- entries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "qwen3_next"])
def test_a_row_that_begins_with_an_entry_goes_on_as_if_it_had_computed_it(models: dict[str, Path], family: str) -> None:
    """The entry is kept behind the prompt's last chunk while its row decodes on; two rows begin with it, in turn."""
    text, other = some_prompts(9, 5)
    tails = some_prompts(3, 4)
    expected = [greedy(models[family], [*text, *tail], 4) for tail in tails]
    chain = Chain.load(models[family], [1, 2, 1])
    rows = {0: [chain.submit(prefill(text))[0]]}
    step = Microbatch(1, Kind.DECODE, (0,), (rows[0][0],), sample=True, store=(Store(0, 7),))
    rows[0].append(chain.submit(step)[0])
    chain.decode(rows, 3)
    assert rows[0] == greedy(models[family], text, 5)
    chain.release(0)
    assert all(runner.cache_bytes == 0 and runner.prefix_bytes > 0 for runner in chain.runners)

    got = {}
    for row, tail in ((1, tails[0]), (2, tails[1])):
        got[row] = [chain.submit(prefill(tail, first=row, load=(Load(row, 7, 9),)))[row]]
        assert chain.missing == [(), (), ()]
    got[3] = [chain.submit(prefill(other, first=3))[3]]
    chain.decode(got, 3)
    assert [got[1], got[2], got[3]] == [*expected, greedy(models[family], other, 4)]
    chain.release(1, 2, 3, evict=(7, 99))
    assert all(runner.prefix_bytes == 0 for runner in chain.runners)


def test_what_a_row_has_in_its_group_is_kept_beside_its_release(models: dict[str, Path]) -> None:
    """Prompt and answer, less the token drawn last, which no layer has seen; the others of the group go on."""
    texts = some_prompts(6, 10)
    expected = [greedy(models["qwen2"], text, 8) for text in texts]
    chain = Chain.load(models["qwen2"], [2, 2])
    rows = {row: [token] for row, token in chain.submit(prefill(*texts)).items()}
    chain.decode(rows, 3)
    chain.release(0, store=(Store(0, 1),))
    ended = rows.pop(0)
    chain.decode(rows, 4)
    assert rows[1] == expected[1]
    positions = len(texts[0]) + len(ended) - 1
    load = prefill(ended[-1:], first=5, load=(Load(5, 1, positions),))
    again = {5: [chain.submit(load)[5]]}
    chain.decode(again, 3)
    assert ended + again[5] == expected[0]


def test_part_of_an_entry_is_enough_where_caches_can_be_cut(models: dict[str, Path]) -> None:
    text, tail = some_prompts(12, 4)
    expected = greedy(models["qwen2"], [*text[:5], *tail], 4)
    chain = Chain.load(models["qwen2"], [2, 2])
    assert all(runner.can_trim for runner in chain.runners)
    chain.submit(prefill(text))
    chain.release(0, store=(Store(0, 3),))
    rows = {1: [chain.submit(prefill(tail, first=1, load=(Load(1, 3, 5),)))[1]]}
    chain.decode(rows, 3)
    assert rows[1] == expected
    # The entry itself is still whole.
    assert chain.submit(prefill(tail, first=2, load=(Load(2, 3, 12),))) == {
        2: greedy(models["qwen2"], [*text, *tail], 1)[0]
    }


def test_a_row_without_its_entry_is_missing_and_disturbs_nobody(models: dict[str, Path]) -> None:
    """Unknown, evicted or too short an entry: zeros of the promised shape and no token, until the row is released."""
    text, tail = some_prompts(5, 3)
    chain = Chain.load(models["qwen2"], [2, 2])
    chain.submit(prefill(text))
    chain.release(0, store=(Store(0, 1), Store(44, 2)))
    for row, (entry, length) in enumerate([(2, 5), (9, 1), (1, 6), (1, 0)], start=10):
        assert chain.submit(prefill(tail, first=row, load=(Load(row, entry, length),))) == {}
        assert chain.missing == [(row,), (row,)]
        frame = chain.outcomes[0].frame
        assert frame is not None
        assert frame.tensors[0].shape == (1, 3, 64)
        assert not any(memoryview(frame.payload))
    good = {20: [chain.submit(prefill(text, first=20))[20]]}
    expected = greedy(models["qwen2"], text, 2)
    step = Microbatch(1, Kind.DECODE, (10, 20), (1, good[20][0]), sample=True)
    assert chain.submit(step) == {20: expected[1]}
    assert chain.missing == [(), ()]
    chain.release(10, 11, 12, 13, 20)
    assert all(runner.num_rows == 0 for runner in chain.runners)


def test_a_slice_says_what_its_rows_take(models: dict[str, Path]) -> None:
    text = some_prompts(256)[0]  # positions are reserved in steps of as many
    for family in ("qwen2", "gemma3_text", "qwen3_next"):
        chain = Chain.load(models[family], [1, 2, 1])
        chain.submit(prefill(text[:255], sample=False))
        chain.submit(Microbatch(1, Kind.PREFILL, (0,), tuple(text[255:]), sample=True))
        for runner in chain.runners:
            assert runner.kv_fixed_bytes + 256 * runner.kv_bytes_per_position == runner.cache_bytes


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_families_that_forget_begin_with_a_whole_entry_or_none(models: dict[str, Path], family: str) -> None:
    """A window that has slid and a recurrent state cannot be cut; only stages with other layers could."""
    chain = Chain.load(models[family], [1, 2, 1])
    assert not all(runner.can_trim for runner in chain.runners)
    chain.submit(prefill(some_prompts(9)[0]))
    chain.release(0, store=(Store(0, 1),))
    chain.submit(prefill([1], first=1, load=(Load(1, 1, 8),)))
    assert (1,) in chain.missing
    chain.submit(prefill([1], first=2, load=(Load(2, 1, 9),)))
    assert chain.missing == [(), (), ()]
