"""What is read off a prompt is what the whole model gives for it, however it is cut into slices and chunks."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_cluster.microbatch import Kind, PooledRow, RowSpec, ScoredToken
from mlx_cluster.request import Pool, Sampling
from tests.tiny_models import write_tiny_model
from tests.unit.model.test_runner import Pipeline

PROMPT = (5, 9, 250, 3, 3, 77, 120, 8, 41, 6, 200)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("reading") / "model", family="qwen3", layers=4, width=64, vocab=300)


@pytest.fixture(scope="module")
def pipelines(model_dir: Path) -> dict[tuple[int, ...], Pipeline]:
    return {split: Pipeline(model_dir, split) for split in ((4,), (2, 2))}


def read(pipeline: Pipeline, spec: RowSpec, chunk: int) -> tuple[list[ScoredToken], list[PooledRow], int]:
    """What the last stage says of a prompt in chunks: its tokens' scores, its vector, how many tokens it drew."""
    scored: list[ScoredToken] = []
    for at in range(0, len(PROMPT), chunk):
        last = at + chunk >= len(PROMPT)
        admit = () if at else (spec,)
        out = pipeline.submit(Kind.PREFILL, [spec.row], PROMPT[at : at + chunk], sample=last, admit=admit)[-1]
        assert not out.failed
        scored += out.scored
    pipeline.submit(Kind.CONTROL, release=[spec.row])
    return scored, list(out.pooled), len(out.sampled)


@pytest.mark.parametrize("split", [(4,), (2, 2)])
@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_every_token_of_the_prompt_is_scored_once(
    pipelines: dict[tuple[int, ...], Pipeline], model_dir: Path, split: tuple[int, ...], chunk: int
) -> None:
    spec = RowSpec(chunk, GREEDY, 0, prompt_length=len(PROMPT), history=PROMPT, prompt_logprobs=2)
    scored, pooled, drawn = read(pipelines[split], spec, chunk)
    assert (pooled, drawn) == ([], 1)
    assert [(s.position, s.token_id) for s in scored] == list(enumerate(PROMPT))[1:]
    model, _ = load_model(model_dir)
    model.set_dtype(mx.float32)
    logits = model(mx.array([PROMPT]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for entry in scored:
        line = logprobs[entry.position - 1]
        assert entry.logprob == pytest.approx(line[entry.token_id].item(), abs=1e-4)
        assert entry.top[0][1] == pytest.approx(line.max().item(), abs=1e-4)
        assert len(entry.top) == 2


@pytest.mark.parametrize("split", [(4,), (2, 2)])
@pytest.mark.parametrize("chunk", [4, 11])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_vector_of_a_prompt_is_the_models_own_state(
    pipelines: dict[tuple[int, ...], Pipeline], model_dir: Path, split: tuple[int, ...], chunk: int, pool: Pool
) -> None:
    scored, pooled, drawn = read(pipelines[split], RowSpec(40 + chunk, GREEDY, 0, pool=pool), chunk)
    assert (scored, drawn) == ([], 0)
    model, _ = load_model(model_dir)
    model.set_dtype(mx.float32)
    states = model.model(mx.array([PROMPT]))[0]
    vector = states[-1] if pool == "last" else states.mean(axis=0)
    expected = (vector / mx.linalg.norm(vector)).tolist()
    assert pooled[0].values == pytest.approx(expected, abs=1e-4)
    assert sum(value * value for value in pooled[0].values) == pytest.approx(1.0, abs=1e-4)


def test_a_family_without_such_a_state_fails_the_row_alone(tmp_path: Path) -> None:
    pipeline = Pipeline(write_tiny_model(tmp_path / "model", family="mamba", layers=2, width=64, vocab=300), (2,))
    spec = RowSpec(1, GREEDY, 0, pool="last")
    out = pipeline.submit(Kind.PREFILL, [1], PROMPT, admit=[spec])[-1]
    assert "no state that could be an embedding" in out.failed[0].message
    assert pipeline.prefill(RowSpec(2, GREEDY, 0), PROMPT).row == 2
