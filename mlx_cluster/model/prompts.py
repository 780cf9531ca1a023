"""Several short prompts in one forward pass: padded on the right, taken apart again behind it.

Owns: the batch of empty caches, its padding, and the question whether a slice computes such a batch rightly.
Does not own: which prompts share a microbatch (the engine) and what becomes of their rows (``model.runner``).
Invariant: a row's caches are what its prompt alone would have left, as far as rounding goes.

Causal layers never look at what stands behind a row's end, so padding matters only to what is remembered: mlx-lm's
caches get rid of its keys, but a recurrent state must not be advanced by it, and not every model's file knows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from mlx_cluster.model import cache as row_cache
from mlx_cluster.model.cache import Caches
from mlx_cluster.model.slice import ModelSlice

# Lengths of the prompts that try a slice out, and how far its answers may lie from those to each prompt alone, relative
# to the largest, where weights are float32 and where they are shorter.
_TRIAL_LENGTHS = (2, 5)
_MAX_ERROR = 1e-3
_MAX_ERROR_HALF = 5e-2


def begin(part: ModelSlice, lengths: Sequence[int]) -> Caches:
    """Empty caches of a batch whose rows will get prompts of these lengths, padded on the right to the longest."""
    batch = row_cache.merge([part.make_caches() for _ in lengths])
    for cache in batch:
        # Each slot once: what the model sees are aliases of these.
        cache.prepare(lengths=list(lengths), right_padding=[max(lengths) - length for length in lengths])
    return batch


def end(batch: Caches, lengths: Sequence[int]) -> list[Caches]:
    """Take the batch apart behind its forward pass: the caches of each row, to be evaluated with the pass."""
    padding = [max(lengths) - length for length in lengths]
    for cache in batch:
        cache.finalize()
        _settle(cache, lengths, padding)
    return [[cache.extract(index) for cache in batch] for index in range(len(lengths))]


def pad(rows: Sequence[Sequence[int]], padding: int = 0) -> mx.array:
    """Tokens (rows, longest), with the token ``padding`` behind shorter rows."""
    longest = max(map(len, rows))
    return mx.array([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=mx.int32)


def is_exact(part: ModelSlice) -> bool:
    """Whether this slice computes padded prompts as it computes each alone; found by trying, on loaded weights.

    What a row gets must not change by a bit when the padding does (a recurrent state that padding got into may be
    nearly right), and must be near what its prompt gets alone (another kernel rounds differently).
    """
    if not part.can_batch:
        return False
    rows = [[(7 * row + 3 * at + 1) % part.vocab_size for at in range(n)] for row, n in enumerate(_TRIAL_LENGTHS)]
    state = [_noise(array, 1) for array in part.stand_ins(len(rows), max(_TRIAL_LENGTHS))]
    try:
        together = _try_together(part, rows, state, padding=0)
        otherwise = _try_together(part, rows, state, padding=1)
        alone = _try_alone(part, rows, state)
        same = all(mx.array_equal(a, b).item() for a, b in zip(together, otherwise, strict=True))
        return same and all(_is_near(a, b) for a, b in zip(together, alone, strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False


def _try_together(
    part: ModelSlice, rows: Sequence[Sequence[int]], state: Sequence[mx.array], *, padding: int
) -> list[mx.array]:
    """What each row gets, and gets one step later, with this padding."""
    lengths = [len(row) for row in rows]
    batch = begin(part, lengths)
    padded = [_padded(array, lengths, padding) for array in state]
    output = part(pad(rows, padding), padded, batch, head="last", lengths=lengths)
    tried: list[mx.array] = []
    for row, caches in enumerate(end(batch, lengths)):
        mine = [array[row : row + 1] for array in output]
        tried += mine if part.last else part.fit_output(mine, lengths[row])
        tried += _next(part, caches)
    return tried


def _try_alone(part: ModelSlice, rows: Sequence[Sequence[int]], state: Sequence[mx.array]) -> list[mx.array]:
    tried: list[mx.array] = []
    for row, tokens in enumerate(rows):
        caches = part.make_caches()
        mine = part.fit_received([array[row : row + 1] for array in state], len(tokens))
        tried += part(pad([tokens]), mine, caches, head="last")
        tried += _next(part, caches)
    return tried


def _next(part: ModelSlice, caches: Caches) -> list[mx.array]:
    """The step behind a prompt: it depends on all that its caches remember."""
    state = [_noise(array, 1) for array in part.stand_ins(1, 1)]
    return part(pad([[part.vocab_size // 2]]), state, caches, head="last")


def _padded(array: mx.array, lengths: Sequence[int], padding: int) -> mx.array:
    """A received state with other noise behind the ends of its rows."""
    positions = mx.arange(array.shape[1]) < mx.array(list(lengths))[:, None]
    return mx.where(positions.reshape(*positions.shape, *[1] * (array.ndim - 2)), array, _noise(array, 2 + padding))


def _noise(array: mx.array, seed: int) -> mx.array:
    """Zeros would be a state that leaves no trace."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return mx.random.normal(array.shape, key=mx.random.key(seed)).astype(array.dtype)


def _is_near(array: mx.array, other: mx.array) -> bool:
    allowed = _MAX_ERROR if other.dtype == mx.float32 else _MAX_ERROR_HALF
    mine, theirs = array.astype(mx.float32), other.astype(mx.float32)
    return bool((mx.abs(mine - theirs).max() <= allowed * mx.abs(theirs).max()).item())


def _settle(cache: Any, lengths: Sequence[int], padding: Sequence[int]) -> None:
    """Tell a batch cache the padding that its arrays come to, so that ``extract`` need not wait for the device."""
    if isinstance(cache, CacheList):
        for part in cache.caches:
            _settle(part, lengths, padding)
    elif hasattr(cache, "left_padding") and hasattr(cache, "offset"):
        cache.left_padding, cache.offset = mx.array(list(padding)), mx.array(list(lengths))
