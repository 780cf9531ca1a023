"""The sampler: against numpy, against mlx-lm's samplers, and row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_cluster.model import sampling
from mlx_cluster.model.sampling import Draw
from mlx_cluster.request import Sampling

VOCAB = 50


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> mx.array:
    return 3 * mx.random.normal((rows, vocab), key=mx.random.key(seed))


def tokens(values: mx.array, draws: Sequence[Draw]) -> list[int]:
    out: list[int] = sampling.sample(values, draws).tokens.tolist()  # type: ignore[assignment]
    return out


def frequencies(row: mx.array, parameters: Sampling, draws: int = 4000) -> np.ndarray:
    """How often each id is drawn over token indices 0…draws."""
    drawn = tokens(mx.repeat(row[None], draws, axis=0), [Draw(parameters, 0, index) for index in range(draws)])
    return np.bincount(drawn, minlength=row.shape[0]) / draws


def test_greedy_rows_are_the_exact_argmax() -> None:
    values = logits(6)
    draws = [Draw(Sampling(temperature=0.0), 0, 0)] * 6
    assert tokens(values, draws) == mx.argmax(values, axis=-1).tolist()
    mixed = [Draw(Sampling(temperature=0.0 if row % 2 else 1.5, seed=row), 0, 0) for row in range(6)]
    assert tokens(values, mixed)[1::2] == mx.argmax(values, axis=-1).tolist()[1::2]


def test_a_top_k_of_one_is_greedy_even_among_ties() -> None:
    tied = mx.zeros((1, VOCAB))
    draws = [tokens(tied, [Draw(Sampling(top_k=1), 0, index)]) for index in range(20)]
    assert draws == [[0]] * 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature: float) -> None:
    row = logits(1, vocab=8)[0]
    expected = np.array(mx.softmax(row / temperature))
    assert np.abs(frequencies(row, Sampling(temperature=temperature)) - expected).max() < 0.03


@pytest.mark.parametrize(
    "parameters",
    [
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.05),
        Sampling(top_k=7, top_p=0.9),
        Sampling(top_k=9, top_p=0.95, min_p=0.02, temperature=1.7),
    ],
    ids=str,
)
def test_filters_keep_what_those_of_mlx_lm_keep(parameters: Sampling) -> None:
    row = logits(1, seed=4)
    kept = row - mx.logsumexp(row, axis=-1, keepdims=True)
    if parameters.top_p < 1:
        kept = apply_top_p(kept, parameters.top_p)
    if parameters.min_p > 0:
        kept = apply_min_p(kept, parameters.min_p)
    if parameters.top_k > 0:
        kept = apply_top_k(kept, parameters.top_k)
    expected = np.array(mx.softmax(kept / parameters.temperature, axis=-1))[0]
    got = frequencies(row[0], parameters)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(expected))
    assert np.abs(got - expected).max() < 0.03
    assert np.count_nonzero(expected) < VOCAB


def test_a_tiny_top_p_leaves_the_best_token() -> None:
    row = logits(1)
    best = int(mx.argmax(row).item())
    for parameters in (Sampling(top_p=1e-6), Sampling(top_p=0.0), Sampling(min_p=1.0)):
        assert tokens(mx.repeat(row, 10, axis=0), [Draw(parameters, 0, i) for i in range(10)]) == [best] * 10


def test_a_row_does_not_see_its_neighbours() -> None:
    """Every row of a mixed batch draws what it draws alone, and in any other company."""
    some = [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.0, seed=2),
        Sampling(temperature=0.7, seed=3, top_k=3, top_logprobs=2),
        Sampling(temperature=1.4, seed=4, top_p=0.7),
        Sampling(temperature=1.0, seed=5, min_p=0.1, logit_bias=((4, 3.0),)),
        Sampling(temperature=1.0, seed=6, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    ]
    history = Counter([1, 2, 2, 7])
    values = logits(len(some))
    draws = [Draw(s, 1, 5, history, history) for s in some]
    together = tokens(values, draws)
    assert together == [tokens(values[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    order = [4, 2, 0, 5, 1, 3]
    shuffled = tokens(values[mx.array(order)], [draws[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_the_key_is_seed_choice_and_index() -> None:
    keys = {
        sampling.draw_key(seed, choice, index)
        for seed in (0, 1, -1, 2**63)
        for choice in range(3)
        for index in range(50)
    }
    assert len(keys) == 600
    # Pinned: a change here would make resumed requests differ between nodes of two versions.
    assert sampling.draw_key(7, 0, 3) == (2997208244, 3412210622)


def test_penalties_and_bias_equal_a_numpy_reference() -> None:
    values = logits(3, seed=9)
    parameters = [
        Sampling(
            temperature=0.0,
            presence_penalty=0.7,
            frequency_penalty=0.3,
            repetition_penalty=1.5,
            logit_bias=((0, 4.0), (7, -2.0), (0, 1.0)),
        ),
        Sampling(temperature=0.0, repetition_penalty=2.0),
        Sampling(temperature=0.0),
    ]
    prompt, emitted = [3, 3, 7, 11], [5, 5, 5, 7, 12]
    draws = [Draw(p, 0, 0, Counter(prompt + emitted), Counter(emitted)) for p in parameters]
    expected = np.array(values)
    for row, p in enumerate(parameters):
        for token, bias in p.logit_bias:
            expected[row, token] += bias
        for token in set(prompt + emitted):
            value = expected[row, token]
            expected[row, token] = value * p.repetition_penalty if value < 0 else value / p.repetition_penalty
        for token, count in Counter(emitted).items():
            expected[row, token] -= p.presence_penalty + p.frequency_penalty * count
    np.testing.assert_allclose(np.array(sampling._adjust(values, draws)), expected, rtol=1e-6)
    assert tokens(values, draws) == expected.argmax(-1).tolist()


def test_logprobs_are_those_of_the_raw_logits() -> None:
    values = logits(2, seed=2)
    raw = np.array(values - mx.logsumexp(values, axis=-1, keepdims=True))
    biased = Sampling(temperature=0.0, logit_bias=((17, 100.0),), top_logprobs=20)
    drawn = sampling.sample(values, [Draw(biased, 0, 0), Draw(Sampling(temperature=0.0), 0, 0)])
    assert drawn.logprobs is not None
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    assert drawn.tokens[0].item() == 17
    assert drawn.logprobs[0].item() == pytest.approx(raw[0, 17])
    best = np.argsort(-raw[0])[:20]
    assert drawn.top_ids[0].tolist() == best.tolist()
    np.testing.assert_allclose(np.array(drawn.top_logprobs[0]), raw[0, best], rtol=1e-5)


def test_no_logprobs_are_computed_when_nobody_asks() -> None:
    drawn = sampling.sample(logits(2), [Draw(Sampling(), 0, 0)] * 2)
    assert len(drawn.arrays()) == 1


def test_a_vocabulary_smaller_than_twenty() -> None:
    drawn = sampling.sample(logits(1, vocab=6), [Draw(Sampling(top_k=40, top_logprobs=5), 0, 0)])
    assert drawn.top_ids is not None
    assert sorted(drawn.top_ids[0].tolist()) == list(range(6))  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_are_named() -> None:
    assert sampling.check_ids(Sampling(logit_bias=((49, 1.0),)), [0, 49], 50) is None
    assert "logit_bias names token 50" in str(sampling.check_ids(Sampling(logit_bias=((50, 1.0),)), [], 50))
    assert "history names token -1" in str(sampling.check_ids(Sampling(), [3, -1], 50))
