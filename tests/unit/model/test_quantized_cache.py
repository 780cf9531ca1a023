"""Quantized keys and values: the same as mlx-lm's own for one row, and as each row alone for a batch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mlx_cluster.errors import UnsupportedModel
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import prompts
from mlx_cluster.model.quantized_cache import KvFormat, QuantizedBatchCache
from mlx_cluster.model.slice import ModelSlice
from tests.tiny_models import build_tiny

FORMATS = [KvFormat(8, 64), KvFormat(4, 64), KvFormat(8, 32), KvFormat(4, 32)]
HEADS, SIZE = 2, 64


def keys(rows: int, positions: int, seed: int) -> mx.array:
    return mx.random.normal((rows, HEADS, positions, SIZE), key=mx.random.key(seed))


def plain(triple: Any, kv: KvFormat) -> mx.array:
    return mx.dequantize(*triple, group_size=kv.group_size, bits=kv.bits)


def assert_equal(one: mx.array, other: mx.array) -> None:
    assert one.shape == other.shape
    assert mx.array_equal(one, other).item()


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_a_batch_is_its_rows(kv: KvFormat) -> None:
    """Beside mlx-lm's unquantized batch: same offsets, paddings and masks; beside single rows: same bits."""
    singles = [kv.empty_row() for _ in range(3)]
    stock = [KVCache() for _ in range(3)]
    for row, length in enumerate((5, 2, 9)):
        new = keys(1, length, row)
        singles[row].update_and_fetch(new, -new)
        stock[row].update_and_fetch(new, -new)
    batch, mirror = QuantizedBatchCache.merge(singles), BatchKVCache.merge(stock)

    def check() -> None:
        assert batch.offset.tolist() == mirror.offset.tolist()
        assert batch.left_padding.tolist() == mirror.left_padding.tolist()
        assert (batch.size(), batch.empty()) == (mirror.size(), mirror.empty())
        for positions in (1, 3):
            assert_equal(batch.make_mask(positions), mirror.make_mask(positions))
        for row in range(len(mirror.offset.tolist())):
            mine, theirs = batch.extract(row), mirror.extract(row)
            assert mine.offset == theirs.offset
            for side in (0, 1):
                want = mx.quantize(theirs.keys_and_values()[side], group_size=kv.group_size, bits=kv.bits)
                for a, b in zip(mine.keys_and_values()[side], want, strict=True):
                    assert_equal(a, b)

    check()
    for step in range(3):
        new = keys(3, 1, 10 + step)
        batch.update_and_fetch(new, -new)
        mirror.update_and_fetch(new, -new)
    check()
    assert batch.trim(2) == mirror.trim(2) == 2
    check()
    other, other_mirror = kv.empty_row(), KVCache()
    new = keys(1, 300, 20)
    other.update_and_fetch(new, -new)
    other_mirror.update_and_fetch(new, -new)
    batch.extend(QuantizedBatchCache.merge([other]))
    mirror.extend(BatchKVCache.merge([other_mirror]))
    check()
    for rows in ([2, 0, 3], [1, 0]):
        batch.filter(mx.array(rows))
        mirror.filter(mx.array(rows))
        check()


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_prompts_padded_on_the_right_end_together(kv: KvFormat) -> None:
    lengths, longest = [2, 5, 3], 5
    padding = [longest - length for length in lengths]
    batch = QuantizedBatchCache.merge([kv.empty_row() for _ in lengths])
    mirror = BatchKVCache.merge([KVCache() for _ in lengths])
    new = keys(3, longest, 1)
    for each in (batch, mirror):
        each.prepare(lengths=lengths, right_padding=padding)
        each.update_and_fetch(new, new)
        each.finalize()
    assert batch.offset.tolist() == mirror.offset.tolist()
    assert batch.left_padding.tolist() == mirror.left_padding.tolist()
    for row, length in enumerate(lengths):
        got = plain(batch.extract(row).keys_and_values()[0], kv)
        assert_equal(got, plain(mx.quantize(new[row : row + 1, :, :length], kv.group_size, kv.bits), kv))
    more = keys(3, 1, 2)
    assert batch.update_and_fetch(more, more)[0][0].shape[2] == longest + 1


def test_an_empty_batch_can_be_extended_and_padded_on_the_left() -> None:
    kv = FORMATS[0]
    batch, other = (QuantizedBatchCache.merge([kv.empty_row()]) for _ in range(2))
    assert batch.empty()
    batch.extend(other)
    assert batch.offset.tolist() == [0, 0]
    batch.prepare(left_padding=[1, 0])
    batch.update_and_fetch(keys(2, 3, 0), keys(2, 3, 1))
    assert batch.offset.tolist() == [2, 3]
    with pytest.raises(ValueError, match="only be added to an empty batch"):
        batch.prepare(left_padding=[1, 0])
    late = QuantizedBatchCache.merge([kv.empty_row()])
    late.extend(batch)
    assert late.left_padding.tolist() == [3, 1, 0]


def test_the_bytes_of_a_position_are_those_of_its_bits() -> None:
    for kv in FORMATS:
        cache = kv.empty_row()
        new = keys(1, 2, 0)
        cache.update_and_fetch(new, new)
        groups = SIZE // kv.group_size
        expected = 2 * HEADS * (SIZE * kv.bits // 8 + groups * 2 * 4)  # float32 scales and biases
        assert row_cache.cost([cache]) == row_cache.Cost(0, expected)


# -- with models --------------------------------------------------------------------------------------


def build(family: str, kv: KvFormat, start: int = 0, end: int = 4) -> ModelSlice:
    return ModelSlice(build_tiny(family, layers=4, width=256, vocab=320), start, end, kv)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
@pytest.mark.parametrize("kv", [KvFormat(8, 64), KvFormat(4, 32)], ids=str)
def test_a_slice_computes_what_mlx_lm_computes_with_its_quantized_caches(family: str, kv: KvFormat) -> None:
    model = build_tiny(family, layers=4, width=256, vocab=320)
    expected_caches: Any = [QuantizedKVCache(kv.group_size, kv.bits) for _ in model.layers]
    tokens = mx.array([[3, 1, 4, 1, 5]])
    expected = [model(tokens, cache=expected_caches)[:, -1], model(mx.array([[9]]), cache=expected_caches)[:, -1]]
    part = build(family, kv)
    caches = part.make_caches()
    (first,) = part(tokens, [], caches)
    (second,) = part(mx.array([[9]]), [], caches)
    assert mx.array_equal(first[:, -1], expected[0]).item()
    assert mx.array_equal(second[:, -1], expected[1]).item()


def test_two_slices_compute_what_one_does() -> None:
    kv = KvFormat(4, 32)
    whole, parts = build("qwen2", kv), [build("qwen2", kv, 0, 1), build("qwen2", kv, 1, 4)]
    caches, each = whole.make_caches(), [part.make_caches() for part in parts]
    for tokens in (mx.array([[3, 1, 4]]), mx.array([[9]])):
        (logits,) = whole(tokens, [], caches)
        hidden = parts[0](tokens, [], each[0])
        assert mx.array_equal(parts[1](tokens, hidden, each[1])[0][:, -1], logits[:, -1]).item()


@pytest.mark.parametrize("kv", [KvFormat(8, 64), KvFormat(4, 32)], ids=str)
def test_rows_decode_together_as_alone(kv: KvFormat) -> None:
    part = build("qwen2", kv)
    assert part.can_batch
    rows, alone = [], []
    for length in (2, 7, 4):
        caches = part.make_caches()
        part(mx.array([[5 + i for i in range(length)]]), [], caches)
        rows.append(row_cache.copied(caches))
        alone.append(part(mx.array([[8]]), [], caches)[0][0, -1])
    together = part(mx.array([[8]] * 3), [], row_cache.merge(rows))[0][:, -1]
    assert mx.allclose(together, mx.stack(alone), atol=2e-3, rtol=0).item()


def test_short_prompts_may_share_a_pass() -> None:
    assert prompts.is_exact(build("qwen2", KvFormat(8, 64)))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3_text", "gemma3_text keeps a RotatingKVCache"),
        ("mamba", "mamba keeps a ArraysCache"),
        ("deepseek_v3", "deepseek_v3 cannot attend to keys"),
        ("gemma2", "gemma2 cannot attend to keys"),
        ("gpt_oss", "gpt_oss keeps a RotatingKVCache"),
    ],
)
def test_models_that_cannot_are_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"runtime.kv_bits is 8, but this ({reason}).*runtime.kv_bits to null"):
        build(family, KvFormat(8, 32))


def test_heads_that_are_not_whole_groups_are_refused_with_the_remedy() -> None:
    def small() -> Any:
        return build_tiny("qwen2", layers=2, width=128, vocab=320)  # heads of 32

    with pytest.raises(UnsupportedModel, match=r"set runtime\.kv_group_size to 32"):
        ModelSlice(small(), 0, 2, KvFormat(8, 64))
    assert ModelSlice(small(), 0, 2, KvFormat(8, 32)).kv is not None
