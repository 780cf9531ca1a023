"""The trainer on a model of two layers: it learns something, writes what mlx-lm loads, and goes on after a cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load

from mlx_cluster.demo.lessons import Corpus, read_corpus
from mlx_cluster.demo.train import Batches, Recipe, Trainer, first_weights, train
from mlx_cluster.demo.vocabulary import train_tokenizer

TINY = Recipe(steps=2, vocab_size=320, layers=2, intermediate=64, rows=2, length=48, long_rows=2, long_length=64)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    whole = read_corpus()
    return dataclasses.replace(whole, topics=whole.topics[:4], passages=whole.passages[:4])


def batches(corpus: Corpus) -> Batches:
    return Batches(TINY, corpus, train_tokenizer(corpus.texts(), TINY.vocab_size, 2048))


def test_a_run_writes_a_model_that_mlx_lm_loads(tmp_path: Path, corpus: Corpus) -> None:
    lines: list[str] = []
    train(TINY, tmp_path, corpus, report=lambda line, flush: lines.append(line))
    model, tokenizer = load(str(tmp_path))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    logits = model(mx.array([prompt]))
    assert logits.shape == (1, len(prompt), TINY.vocab_size)
    assert bool(mx.isfinite(logits).all())
    assert [line.split()[1] for line in lines] == ["0", "1"]
    assert not (tmp_path / "checkpoint").exists()


def test_the_loss_falls_and_shards_do_not_change_it(corpus: Corpus) -> None:
    batch = batches(corpus).at(0)
    losses = []
    for shards in (1, 2):
        trainer = Trainer(dataclasses.replace(TINY, shards=shards, steps=100, warmup_steps=1))
        losses.append([trainer.step(batch) for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.2


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path, corpus: Corpus) -> None:
    source = batches(corpus)
    whole, first = Trainer(TINY), Trainer(TINY)
    for step in range(2):
        whole.step(source.at(step))
    first.step(source.at(0))
    first.save(tmp_path / "state.safetensors")
    resumed = Trainer(TINY)
    assert resumed.restore(tmp_path / "state.safetensors") == 1
    resumed.step(source.at(1))
    for (name, one), (_, other) in zip(
        tree_flatten(whole.model.parameters()), tree_flatten(resumed.model.parameters()), strict=True
    ):
        assert mx.allclose(one, other, atol=1e-6), name


def test_the_first_head_looks_at_the_previous_position() -> None:
    args = TINY.model_args()
    weights = first_weights(args, np.random.default_rng(0))
    dim = args.hidden_size // args.num_attention_heads
    query = weights["model.layers.0.self_attn.q_proj.bias"][:dim]
    key = weights["model.layers.0.self_attn.k_proj.bias"]
    num_positions = 64
    rows = mx.array(np.stack([query, key]).astype(np.float32))[:, None, None, :]
    turned = mx.fast.rope(
        mx.broadcast_to(rows, (2, 1, num_positions, dim)),
        dim,
        traditional=False,
        base=args.rope_theta,
        scale=1.0,
        offset=0,
    )
    scores = np.array(turned[0, 0] @ turned[1, 0].T)
    for position in range(1, num_positions):
        assert scores[position, : position + 1].argmax() == position - 1
