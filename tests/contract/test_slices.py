"""Every family, cut in three, against the whole model: logits equal bit for bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import families, graph, prompts
from mlx_cluster.model.cache import Caches
from mlx_cluster.model.slice import ModelSlice
from tests.tiny_models import FAMILIES, build_tiny, tiny_config

VOCAB = 320
# gemma2's own file cannot run more than one row, llama4's chunked caches cannot be merged: they decode row by row.
ONE_ROW_ONLY = {"gemma2", "llama4"}


class Chain:
    """Slices of one model, run one after the other, as a pipeline does."""

    def __init__(self, family: str, cuts: list[int], layers: int) -> None:
        bounds = [0, *cuts, layers]
        self.slices = [
            # A model of its own per slice, since a slice drops the weights of the others.
            ModelSlice(build_tiny(family, layers=layers, vocab=VOCAB), start, end)
            for start, end in pairwise(bounds)
        ]
        for part in self.slices:
            poison_what_is_not_read(part)

    def make_caches(self) -> list[Caches]:
        return [part.make_caches() for part in self.slices]

    def __call__(self, tokens: mx.array, caches: list[Caches], head: Any = "all") -> mx.array:
        crossing: list[mx.array] = []
        for part, mine in zip(self.slices, caches, strict=True):
            crossing = part(tokens, crossing, mine, head=head)
            mx.eval(crossing, row_cache.states(mine))
        return crossing[0]


def poison_what_is_not_read(part: ModelSlice) -> None:
    """A slice that reads a weight it does not own up to gives NaN."""
    read = part.parameters_read()
    poisoned = [
        (name, mx.full(value.shape, float("nan"), value.dtype))
        for name, value in tree_flatten(part.model.parameters())
        if name not in read and mx.issubdtype(value.dtype, mx.floating)
    ]
    part.model.load_weights(poisoned, strict=False)


def cuts_of(family: str, layers: int) -> list[int]:
    """Two cuts as near to thirds as the family allows."""
    legal = families.legal_cuts(tiny_config(family, layers=layers))
    return sorted({min(legal, key=lambda cut: abs(cut - want)) for want in (layers // 3, 2 * layers // 3)})


def prompt(length: int, seed: int, rows: int = 1) -> mx.array:
    return mx.random.randint(0, VOCAB, (rows, length), key=mx.random.key(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_three_slices_equal_the_whole_model(family: str) -> None:
    """Chunked prefill, decode, then three rows of unequal length as one batch that loses a row."""
    whole = build_tiny(family, vocab=VOCAB)
    chain = Chain(family, cuts_of(family, 6), 6)

    whole_cache, chain_caches = make_prompt_cache(whole), chain.make_caches()
    for step, length in enumerate((11, 5, 5, 1, 1, 1)):
        tokens = prompt(length, step)
        expected = whole(tokens, cache=whole_cache)
        assert mx.array_equal(chain(tokens, chain_caches), expected), f"chunk {step} of {length} tokens"

    assert {part.can_batch for part in chain.slices} == {family not in ONE_ROW_ONLY}
    if family in ONE_ROW_ONLY:
        return
    whole_rows, chain_rows = [], []
    for length in (5, 9, 7):
        tokens = prompt(length, 100 + length)
        whole_rows.append(make_prompt_cache(whole))
        mx.eval(whole(tokens, cache=whole_rows[-1]))
        chain_rows.append(chain.make_caches())
        chain(tokens, chain_rows[-1])
    whole_batch = row_cache.merge(whole_rows)
    chain_batch = [row_cache.merge(stage) for stage in zip(*chain_rows, strict=True)]
    for step, rows in enumerate((3, 3, 2, 2)):
        if step == 2:
            for cache in (*whole_batch, *(c for stage in chain_batch for c in stage)):
                cache.filter(mx.array([0, 2]))
        tokens = prompt(1, 200 + step, rows)
        expected = whole(tokens, cache=whole_batch)
        assert mx.array_equal(chain(tokens, chain_batch), expected), f"batched step {step} of {rows} rows"


@pytest.mark.parametrize("cuts", [[], [1], [5], [2, 4], [1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "qwen3_next"])
def test_any_split_equals_the_whole_model(family: str, cuts: list[int]) -> None:
    whole = build_tiny(family, vocab=VOCAB)
    chain = Chain(family, cuts, 6)
    whole_cache, chain_caches = make_prompt_cache(whole), chain.make_caches()
    for step, length in enumerate((9, 3, 1, 1)):
        tokens = prompt(length, step)
        assert mx.array_equal(chain(tokens, chain_caches), whole(tokens, cache=whole_cache))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_at_the_last_position_is_the_last_of_all(family: str) -> None:
    """Near equality: a product with one row may add in another order than one with many."""
    part = ModelSlice(build_tiny(family, vocab=VOCAB), 0, 6)
    tokens = prompt(8, 1)
    (every,) = part(tokens, [], part.make_caches(), head="all")
    (last,) = part(tokens, [], part.make_caches(), head="last")
    assert last.shape == (1, 1, VOCAB)
    assert mx.allclose(last, every[:, -1:], atol=1e-5)


@pytest.mark.parametrize("lengths", [(), (2, 5)])
def test_the_head_multiplies_one_position_of_each_row_and_none_for_chunks_before_the_last(
    lengths: tuple[int, ...],
) -> None:
    part = ModelSlice(build_tiny("qwen2/untied", vocab=VOCAB), 0, 6)
    seen: list[tuple[int, ...]] = []

    def watch(original: graph.LayerCall) -> graph.LayerCall:
        def call(layer: Any, states: mx.array) -> Any:
            seen.append(tuple(states.shape))
            return original(layer, states)

        return call

    graph.swap_call(part.model.lm_head, watch)
    rows = max(1, len(lengths))
    tokens = mx.zeros((rows, 5), mx.int32)
    caches = prompts.begin(part, lengths) if lengths else part.make_caches()
    part(tokens, [], caches, head="none")
    assert seen == []
    caches = prompts.begin(part, lengths) if lengths else part.make_caches()
    part(tokens, [], caches, head="last", lengths=lengths)
    assert seen == [(rows, 1, 64)]
