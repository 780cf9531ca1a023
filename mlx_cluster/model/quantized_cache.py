"""Keys and values in eight or four bits: of one row, and of a batch of rows.

Owns: ``QuantizedRowCache`` and ``QuantizedBatchCache``, the counterparts of mlx-lm's ``KVCache`` and ``BatchKVCache``
with the same meaning of every method.
Does not own: which models can use them (``model.slice`` tries), or attention over them: mlx-lm's
``scaled_dot_product_attention`` takes quantized keys when it is given a cache with ``bits``; a model that computes its
attention otherwise cannot use these.
Invariant: a position's keys are quantized once, when they are computed, and never again: joining, leaving, cutting and
copying rows changes no bit of them.

Quantized keys are a triple of arrays: packed values, scales and biases, positions next to last in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_reduce
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import QuantizedKVCache, dynamic_roll

Triple = tuple[mx.array, mx.array, mx.array]
# Buffers grow by so many positions, as mlx-lm's do.
STEP = 256


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How keys and values are kept: ``bits`` for each, ``group_size`` of them share a scale and a bias."""

    bits: int
    group_size: int

    def empty_row(self) -> QuantizedRowCache:
        return QuantizedRowCache(self.group_size, self.bits)


class QuantizedRowCache(QuantizedKVCache):
    """One row; can be merged with others, which mlx-lm's own cannot."""

    def size(self) -> int:
        return int(self.offset)

    @classmethod
    def merge(cls, caches: Sequence[QuantizedRowCache]) -> QuantizedBatchCache:
        return QuantizedBatchCache.merge(caches)


class QuantizedBatchCache:
    """Rows that are padded on the left to the longest; ``offset`` counts each row's own positions."""

    def __init__(self, left_padding: Sequence[int], group_size: int, bits: int) -> None:
        self.group_size, self.bits = group_size, bits
        self.keys: Triple | None = None
        self.values: Triple | None = None
        self.left_padding = mx.array(list(left_padding))
        self.offset = -self.left_padding
        self._idx = 0  # positions of the longest row
        self._right_padding: mx.array | None = None

    # -- what a model calls ---------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Triple, Triple]:
        """Append positions (rows, heads, positions, size); gives all that are here."""
        new = self._quantize(keys), self._quantize(values)
        begin, end = self._idx, self._idx + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = _resized(new, _rounded_up(end))
        else:
            if end > self.keys[0].shape[2]:
                kept = tree_map(lambda a: a[..., :begin, :], (self.keys, self.values))
                self.keys, self.values = _resized(kept, _rounded_up(end))
            assert self.keys is not None
            assert self.values is not None
            for mine, more in zip((*self.keys, *self.values), (*new[0], *new[1]), strict=True):
                mine[..., begin:end, :] = more
        self._idx = end
        self.offset = self.offset + keys.shape[2]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Triple, Triple]:
        both: tuple[Triple, Triple] = tree_map(lambda a: a[..., : self._idx, :], (self.keys, self.values))
        return both

    def make_mask(self, num_positions: int, return_array: bool = False, **more: Any) -> mx.array:
        mask: mx.array = create_causal_mask(num_positions, offset=self._idx, left_padding=self.left_padding, **more)
        return mask

    # -- several prompts at once ------------------------------------------------------------------------

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Before prompts of different lengths: how they are padded. ``lengths`` matter to other kinds of caches."""
        if left_padding is not None:
            if self.keys is not None:
                raise ValueError("padding on the left can only be added to an empty batch")
            padding = mx.array(list(left_padding))
            self.left_padding = self.left_padding + padding
            self.offset = self.offset - padding
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = mx.array(list(right_padding))

    def finalize(self) -> None:
        """Behind them: padding on the right goes to the left, so that the rows end together."""
        padding, self._right_padding = self._right_padding, None
        if padding is None:
            return
        self.keys, self.values = tree_map(
            lambda a: dynamic_roll(a[..., : self._idx, :], padding[:, None], axis=2), (self.keys, self.values)
        )
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding

    # -- rows that come and go -----------------------------------------------------------------------------

    def filter(self, rows: mx.array) -> None:
        """Keep these rows, in this order."""
        if self.keys is not None:
            self.keys, self.values = tree_map(lambda a: a[rows], (self.keys, self.values))
        self.offset, self.left_padding = self.offset[rows], self.left_padding[rows]
        spare: int = min(self.left_padding.tolist())  # type: ignore[type-var,arg-type,assignment]  # one integer a row
        if spare > 0:
            if self.keys is not None:
                self.keys, self.values = tree_map(lambda a: a[..., spare:, :], (self.keys, self.values))
            self._idx -= spare
            self.left_padding = self.left_padding - spare

    def extend(self, other: QuantizedBatchCache) -> None:
        """Add the rows of another batch behind these."""
        longest = max(self._idx, other._idx)
        if self.keys is not None or other.keys is not None:
            mine, theirs = self._aligned(longest, other), other._aligned(longest, self)
            self.keys, self.values = tree_map(lambda a, b: mx.concatenate([a, b]), mine, theirs)
        self.left_padding = mx.concatenate(
            [self.left_padding + longest - self._idx, other.left_padding + longest - other._idx]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = longest

    def extract(self, row: int) -> QuantizedRowCache:
        """One row by itself."""
        cache = QuantizedRowCache(self.group_size, self.bits)
        begin: int = self.left_padding.tolist()[row]  # type: ignore[index,assignment]  # one integer a row
        if self.keys is not None:
            cache.keys, cache.values = tree_map(
                lambda a: mx.contiguous(a[row : row + 1, :, begin : self._idx]), (self.keys, self.values)
            )
            cache.offset = self._idx - begin
        return cache

    @classmethod
    def merge(cls, caches: Sequence[QuantizedRowCache]) -> QuantizedBatchCache:
        """One batch of single rows."""
        longest = max(cache.offset for cache in caches)
        padding = [longest - cache.offset for cache in caches]
        batch = cls(padding, caches[0].group_size, caches[0].bits)
        if longest == 0:
            return batch
        filled = next((cache.keys, cache.values) for cache in caches if cache.keys is not None)

        def padded(cache: QuantizedRowCache, pad: int) -> Any:
            if cache.keys is None:
                return tree_map(lambda a: mx.zeros((1, a.shape[1], longest, a.shape[3]), a.dtype), filled)
            return tree_map(lambda a: _pad(a[..., : cache.offset, :], pad, 0), (cache.keys, cache.values))

        rows = [padded(cache, pad) for cache, pad in zip(caches, padding, strict=True)]
        batch.keys, batch.values = tree_map(lambda *arrays: mx.concatenate(arrays), *rows)
        batch.offset = batch.offset + longest
        batch._idx = longest
        return batch

    # -- what it is ---------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """Everything that must be evaluated with a step."""
        return self.keys, self.values, self.offset, self.left_padding

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """Forget the last positions of every row; gives how many."""
        count = min(self._idx, count)
        self._idx -= count
        self.offset = self.offset - count
        return count

    def size(self) -> int:
        return self._idx

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        return int(tree_reduce(lambda total, a: total + a.nbytes, (self.keys, self.values), 0))

    def _quantize(self, array: mx.array) -> Triple:
        packed, scales, biases = mx.quantize(array, group_size=self.group_size, bits=self.bits)
        return packed, scales, biases

    def _aligned(self, longest: int, other: QuantizedBatchCache) -> Any:
        """Keys and values that end at ``longest``; zeros like the other batch's where this one has none yet."""
        if self.keys is None:
            rows = self.left_padding.shape[0]
            return tree_map(
                lambda a: mx.zeros((rows, a.shape[1], longest, a.shape[3]), a.dtype), (other.keys, other.values)
            )
        return tree_map(lambda a: _pad(a[..., : self._idx, :], longest - self._idx, 0), (self.keys, self.values))


def _rounded_up(positions: int) -> int:
    return -(-positions // STEP) * STEP


def _resized(both: Any, positions: int) -> Any:
    """Room for so many positions."""
    return tree_map(lambda a: _pad(a, 0, positions - a.shape[2]), both)


def _pad(array: mx.array, left: int, right: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, 0), (left, right), (0, 0)]) if left or right else array
