"""SliceRunner: chains of slices in one process give mlx-lm's own tokens, whatever rows do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_cluster.errors import LinkMismatch, PlanError
from mlx_cluster.microbatch import Frame, Kind, Load, Microbatch, Outcome, RowSpec, Sampled, Store
from mlx_cluster.model import sampling
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Sampling
from tests.tiny_models import write_tiny_model

VOCAB = 300
GREEDY = Sampling(temperature=0.0)
WITH_LOGPROBS = Sampling(temperature=0.0, top_logprobs=3)


class Pipeline:
    """Runners one after the other; speaks in headers as an engine does."""

    def __init__(self, model_dir: Path, split: Sequence[int]) -> None:
        bounds = [sum(split[:index]) for index in range(len(split) + 1)]
        self.runners = [SliceRunner.load(model_dir, start, end, device="cpu") for start, end in pairwise(bounds)]
        self.next_id = 0

    def run(self, header: Microbatch) -> list[Outcome]:
        """Every stage's outcome; the frame goes from one to the next."""
        outcomes: list[Outcome] = []
        frame: Frame | None = None
        for runner in self.runners:
            outcomes.append(runner.submit(header, frame).wait())
            frame = outcomes[-1].frame
        return outcomes

    def submit(
        self,
        kind: Kind,
        rows: Sequence[int] = (),
        tokens: Sequence[int] = (),
        *,
        group: int = 0,
        sample: bool = True,
        admit: Sequence[RowSpec] = (),
        release: Sequence[int] = (),
    ) -> list[Outcome]:
        self.next_id += 1
        return self.run(
            Microbatch(
                self.next_id,
                kind,
                rows=tuple(rows),
                tokens=tuple(tokens),
                group=group,
                sample=sample,
                admit=tuple(admit),
                release=tuple(release),
            )
        )

    def prefill(self, spec: RowSpec, prompt: Sequence[int], chunk: int = 1000) -> Sampled:
        admit: Sequence[RowSpec] = (spec,)
        for at in range(0, len(prompt), chunk):
            last = at + chunk >= len(prompt)
            out = self.submit(Kind.PREFILL, [spec.row], prompt[at : at + chunk], sample=last, admit=admit)[-1]
            assert not out.failed
            admit = ()
        return out.sampled[0]

    def decode(self, rows: Sequence[int], tokens: Sequence[int], group: int = 0) -> dict[int, Sampled]:
        out = self.submit(Kind.DECODE, rows, tokens, group=group)[-1]
        assert not out.failed
        assert [s.row for s in out.sampled] == list(rows)
        return {s.row: s for s in out.sampled}

    def generate(self, prompts: Sequence[Sequence[int]], count: int, spec: Sampling = GREEDY) -> list[list[int]]:
        """Prefill each prompt alone, then decode all of them as one group."""
        first = [self.prefill(RowSpec(row, spec, 0), prompt, chunk=7) for row, prompt in enumerate(prompts)]
        tokens = [[sampled.token_id] for sampled in first]
        rows = range(len(prompts))
        for _ in range(count - 1):
            out = self.decode(rows, [tokens[row][-1] for row in rows])
            for row in rows:
                tokens[row].append(out[row].token_id)
        return tokens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "qwen2", layers=28, width=32, vocab=VOCAB, shards=2)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny") / "small", layers=4, width=32, vocab=VOCAB, family="qwen2/untied"
    )


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    return [
        mx.random.randint(0, VOCAB, (5 + 3 * index,), key=mx.random.key(index)).tolist()  # type: ignore[misc]
        for index in range(count)
    ]


def greedy(model_dir: Path, prompt: Sequence[int], count: int) -> list[int]:
    """What mlx-lm alone generates."""
    model, _ = load_model(model_dir)
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=count)
    return [int(token) for token, _ in steps][:count]


@pytest.fixture(scope="module")
def expected_tokens(model_dir: Path) -> list[list[int]]:
    return [greedy(model_dir, prompt, 8) for prompt in prompts(8)]


@pytest.mark.parametrize("split", [[28], [10, 9, 9], [1, 27], [7, 7, 7, 7]], ids=str)
def test_every_split_gives_the_tokens_of_mlx_lm(
    model_dir: Path, expected_tokens: list[list[int]], split: list[int]
) -> None:
    """Eight rows as one group, then one row alone."""
    pipeline = Pipeline(model_dir, split)
    assert pipeline.generate(prompts(8), 8) == expected_tokens
    pipeline.submit(Kind.CONTROL, release=range(8))
    assert pipeline.generate(prompts(1), 8) == expected_tokens[:1]


def test_rows_join_leave_and_change_groups_without_a_trace(small_dir: Path) -> None:
    """Tokens of every row stay those of mlx-lm while rows move; so do log probabilities, nearly."""
    some = prompts(4)
    expected = [greedy(small_dir, prompt, 9) for prompt in some]
    alone = [[] for _ in some]
    reference = Pipeline(small_dir, [4])
    for row, prompt in enumerate(some):
        sampled = reference.prefill(RowSpec(row, WITH_LOGPROBS, 0), prompt)
        alone[row].append(sampled)
        for _ in range(8):
            sampled = reference.decode([row], [sampled.token_id], group=row)[row]
            alone[row].append(sampled)

    pipeline = Pipeline(small_dir, [1, 2, 1])
    got: list[list[Sampled]] = [
        [pipeline.prefill(RowSpec(row, WITH_LOGPROBS, 0), prompt)] for row, prompt in enumerate(some)
    ]

    def step(rows: Sequence[int], group: int) -> None:
        for row, sampled in pipeline.decode(rows, [got[row][-1].token_id for row in rows], group).items():
            got[row].append(sampled)

    step([0, 1], 0)  # two form a group
    step([0, 1, 2], 0)  # one joins
    step([2, 0], 0)  # one leaves and is kept aside, the others change places
    step([3], 1)  # another group of one
    step([3, 1], 1)  # the one kept aside comes back elsewhere
    step([3, 1, 0], 1)  # one moves over from the other group
    step([2], 0)  # which leaves that one alone
    step([0, 1, 2, 3], 2)  # everybody in a new group
    step([0, 2, 3], 2)
    step([1], 1)
    for row in range(4):
        while len(got[row]) < 9:
            step([row], 10 + row)
    for row in range(4):
        assert [s.token_id for s in got[row]] == expected[row]
        for mine, theirs in zip(got[row], alone[row], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]


def test_released_rows_free_their_caches(small_dir: Path) -> None:
    pipeline = Pipeline(small_dir, [2, 2])
    for row, prompt in enumerate(prompts(3)):
        pipeline.prefill(RowSpec(row, GREEDY, 0), prompt)
    pipeline.decode([0, 1], [1, 1])
    assert all(runner.cache_bytes > 0 and runner.num_rows == 3 for runner in pipeline.runners)
    pipeline.submit(Kind.CONTROL, release=[0])
    pipeline.decode([1], [1])
    pipeline.submit(Kind.CONTROL, release=[1, 2])
    assert all(runner.cache_bytes == 0 and runner.num_rows == 0 for runner in pipeline.runners)


def test_warm_up_leaves_nothing_behind(small_dir: Path) -> None:
    for start, end in ((0, 2), (2, 4)):
        runner = SliceRunner.load(small_dir, start, end, device="cpu")
        runner.warm_up()
        assert (runner.num_rows, runner.cache_bytes) == (0, 0)


def test_a_bad_row_fails_alone(small_dir: Path) -> None:
    """A token outside the vocabulary, an unknown row: named on every stage, zeros in the frame, others untouched."""
    some = prompts(2)
    expected = [greedy(small_dir, prompt, 2) for prompt in some]
    pipeline = Pipeline(small_dir, [2, 2])
    first = [pipeline.prefill(RowSpec(row, GREEDY, 0), prompt) for row, prompt in enumerate(some)]
    pipeline.prefill(RowSpec(2, GREEDY, 0), some[0])
    tokens = [first[0].token_id, VOCAB, 1, first[1].token_id]
    front, back = pipeline.submit(Kind.DECODE, [0, 2, 77, 1], tokens)
    for outcome in (front, back):
        assert [failed.row for failed in outcome.failed] == [2, 77]
        assert f"token {VOCAB} is outside the vocabulary of {VOCAB}" in outcome.failed[0].message
        assert "row 77 is not known" in outcome.failed[1].message
    assert front.frame is not None
    assert front.frame.tensors[0].shape == (4, 1, 32)
    hidden = mx.array(memoryview(front.frame.payload)).view(mx.float32).reshape(4, 32)
    assert mx.all(hidden[1:3] == 0)
    assert mx.all(mx.any(hidden != 0, axis=-1) == mx.array([True, False, False, True]))
    assert [(s.row, s.token_id) for s in back.sampled] == [(0, expected[0][1]), (1, expected[1][1])]


def test_a_failed_chunk_still_has_the_promised_shape(small_dir: Path) -> None:
    pipeline = Pipeline(small_dir, [2, 2])
    bad = Sampling(temperature=0.0, logit_bias=((VOCAB + 5, 1.0),))
    front, back = pipeline.submit(Kind.PREFILL, [3], [1, 2, 3], admit=[RowSpec(3, bad, 0)])
    assert front.frame is not None
    assert front.frame.tensors[0].shape == (1, 3, 32)
    assert not any(memoryview(front.frame.payload))
    assert "logit_bias names token 305" in back.failed[0].message
    assert back.sampled == ()


def test_a_decode_without_a_prompt_is_refused(small_dir: Path) -> None:
    (outcome,) = Pipeline(small_dir, [4]).submit(Kind.DECODE, [1], [1], admit=[RowSpec(1, GREEDY, 0)])
    assert "its prompt was not run" in outcome.failed[0].message


def test_a_frame_of_another_microbatch_is_refused(small_dir: Path) -> None:
    pipeline = Pipeline(small_dir, [2, 2])
    front, back = pipeline.runners
    header = Microbatch(1, Kind.PREFILL, rows=(0,), tokens=(1, 2), admit=(RowSpec(0, GREEDY, 0),))
    frame = front.submit(header, None).wait().frame
    assert frame is not None
    with pytest.raises(LinkMismatch, match="lost step"):
        back.submit(Microbatch(2, Kind.PREFILL, rows=(0,), tokens=(1, 2)), frame)
    with pytest.raises(LinkMismatch, match="lost step"):
        back.submit(header, None)
    with pytest.raises(LinkMismatch, match=r"\(1, 3\) tokens"):
        back.submit(Microbatch(1, Kind.PREFILL, rows=(0,), tokens=(1, 2, 3)), frame)


def test_a_resumed_row_draws_what_it_would_have_drawn(small_dir: Path) -> None:
    """Warm sampling with penalties: prompt and emitted ids prefilled again, draws go on at the same index."""
    spec = Sampling(temperature=1.3, seed=5, top_k=50, frequency_penalty=0.4, repetition_penalty=1.2)
    (prompt,) = prompts(1)

    def tokens_of(pipeline: Pipeline, row: RowSpec, text: Sequence[int], count: int) -> list[int]:
        sampled = pipeline.prefill(row, text)
        out = [sampled.token_id]
        while len(out) < count:
            out.append(pipeline.decode([row.row], [out[-1]])[row.row].token_id)
        return out

    whole = tokens_of(Pipeline(small_dir, [4]), RowSpec(0, spec, 1, 0, len(prompt), tuple(prompt)), prompt, 12)
    emitted = [*prompt, *whole[:5]]
    resumed = RowSpec(9, spec, 1, 5, len(prompt), tuple(emitted))
    assert tokens_of(Pipeline(small_dir, [3, 1]), resumed, emitted, 7) == whole[5:]
    assert len(set(whole)) > 3


def test_a_batched_row_draws_what_it_draws_alone(small_dir: Path) -> None:
    warm = Sampling(temperature=1.0, seed=11, top_p=0.9)
    some = prompts(3)
    alone = [Pipeline(small_dir, [4]).generate([prompt], 6, warm)[0] for prompt in some]
    assert Pipeline(small_dir, [2, 2]).generate(some, 6, warm) == alone


def test_the_token_index_keys_the_draw(small_dir: Path) -> None:
    """The first token of a row with ``first_index`` 3 is the draw of index 3 from the same logits."""
    spec = Sampling(temperature=1.0, seed=3)
    (prompt,) = prompts(1)
    model, _ = load_model(small_dir)
    logits = model(mx.array([prompt]))[:, -1]
    expected = sampling.sample(logits, [sampling.Draw(spec, 2, 3)]).tokens.item()
    assert Pipeline(small_dir, [4]).prefill(RowSpec(0, spec, 2, first_index=3), prompt).token_id == expected


def test_families_whose_caches_do_not_merge_decode_row_by_row(tmp_path: Path) -> None:
    """gemma2's file cannot run a batch; its rows still share a microbatch and a frame."""
    model_dir = write_tiny_model(tmp_path / "gemma2", layers=3, width=32, vocab=VOCAB, family="gemma2")
    some = prompts(3)
    pipeline = Pipeline(model_dir, [1, 2])
    assert not pipeline.runners[0].slice.can_batch
    assert pipeline.generate(some, 5) == [greedy(model_dir, prompt, 5) for prompt in some]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cpu_slice_computes_in_float32(tmp_path: Path, dtype: str) -> None:
    model_dir = write_tiny_model(tmp_path / "half", layers=2, width=32, vocab=VOCAB, dtype=dtype)
    runner = SliceRunner.load(model_dir, 0, 1, device="cpu")
    header = Microbatch(1, Kind.PREFILL, rows=(0,), tokens=(1, 2), admit=(RowSpec(0, GREEDY, 0),))
    frame = runner.submit(header, None).wait().frame
    assert frame is not None
    assert frame.tensors[0].dtype == "float32"


def test_a_slice_outside_the_model_is_refused(small_dir: Path) -> None:
    with pytest.raises(PlanError, match="4 layers"):
        SliceRunner.load(small_dir, 2, 5, device="cpu")


def test_a_runner_that_dropped_everything_begins_anew(small_dir: Path) -> None:
    """Row and entry ids come again in the next epoch, and mean something else there."""
    pipeline = Pipeline(small_dir, [2, 2])
    expected = pipeline.generate(prompts(2), 4)
    pipeline.run(Microbatch(99, Kind.CONTROL, store=(Store(0, entry=1),)))
    assert [(r.held().rows, r.held().entries) for r in pipeline.runners] == [(2, 1), (2, 1)]
    for runner in pipeline.runners:
        runner.drop()
    assert [(r.held().rows, r.held().entries, r.cache_bytes) for r in pipeline.runners] == [(0, 0, 0)] * 2
    assert pipeline.generate(prompts(2)[::-1], 4) == expected[::-1]
    spec = RowSpec(7, GREEDY, 0)
    load = Microbatch(100, Kind.PREFILL, (7,), (1, 2), admit=(spec,), load=(Load(7, entry=1, length=3),))
    assert [outcome.missing for outcome in pipeline.run(load)] == [(7,), (7,)]
