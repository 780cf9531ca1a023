"""Drawing tokens from logits: one sampler over the rows of a batch, each with its own parameters.

Owns: penalties, bias, filters, the keyed draw and log probabilities. Pure: nothing here remembers a row.
Does not own: what a row has emitted so far (``model.runner``).
Invariant: what a row draws depends on its logits, its parameters and (seed, choice, token index), never on its
neighbours in the batch.

Semantics, in this order: what a grammar's mask forbids is -inf, and stays it; ``logit_bias`` is added;
``repetition_penalty`` divides positive and multiplies negative logits of every token in prompt or output;
``presence_penalty`` and ``frequency_penalty`` are subtracted for tokens in the output; then ``top_k``, ``top_p`` and
``min_p`` each look at the resulting distribution at temperature 1, as mlx-lm's samplers do, and a token must pass all
three; then the temperature applies and a token is drawn. Tokens that tie with the last one to pass a filter pass too.
Log probabilities are the log-softmax of the *raw* logits, before all of this, as OpenAI and vLLM report them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_cluster.request import Sampling

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's next token: its parameters and everything that the draw depends on.

    ``seen`` counts the ids of prompt and output, ``emitted`` those of the output alone; empty without penalties.
    """

    sampling: Sampling
    choice: int
    token_index: int
    seen: Counter[int] = field(default_factory=Counter)
    emitted: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Lazy results, one line per row: ``tokens`` (rows,), and where a row asked for them ``logprobs`` (rows,),
    ``top_ids`` and ``top_logprobs`` (rows, up to 20), best first."""

    tokens: mx.array
    logprobs: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.tokens, self.logprobs, self.top_ids, self.top_logprobs) if a is not None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What grammars allow: ``values`` (rows, vocabulary) are +inf where a token may be drawn, else -inf.

    ``rows`` are the rows (by index, ascending) that have a grammar.
    """

    rows: tuple[int, ...]
    values: mx.array


# What each byte of a mask stands for: the limits of eight logits. A minimum with them costs a CPU a tenth of a choice.
_LIMITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf
).astype(np.float32)


def limits(masks: Mapping[int, NDArray[np.uint32]], vocab_size: int) -> Limits:
    """From bit masks of allowed tokens, 32 to a word, by row; what a mask does not reach is not allowed.

    This is the host's work, done while the device computes the logits.
    """
    rows = tuple(sorted(masks))
    words = np.zeros((len(rows), -(-vocab_size // 32)), "<u4")
    for at, row in enumerate(rows):
        width = min(words.shape[1], masks[row].size)
        words[at, :width] = masks[row][:width]
    values = np.take(_LIMITS, words.view(np.uint8), axis=0, mode="clip").reshape(len(rows), -1)
    return Limits(rows, mx.array(values[:, :vocab_size]))


def sample(logits: mx.array, draws: Sequence[Draw], limits: Limits | None = None) -> Drawn:
    """Build the draw of one token per row from ``logits`` (rows, vocabulary). Ids in ``draws`` must be below it."""
    raw = logits.astype(mx.float32)
    adjusted = _adjust(_allow(raw, limits) if limits is not None else raw, draws)
    tokens = mx.argmax(adjusted, axis=-1).astype(mx.int32)
    warm = [row for row, draw in enumerate(draws) if not _is_greedy(draw.sampling)]
    if warm:
        every_row = len(warm) == len(draws)
        drawn = _draw(adjusted if every_row else adjusted[mx.array(warm)], [draws[row] for row in warm])
        tokens = drawn if every_row else mx.put_along_axis(tokens, mx.array(warm), drawn, axis=0)
    if all(draw.sampling.top_logprobs is None for draw in draws):
        return Drawn(tokens)
    return with_logprobs(raw, tokens)


def draw_key(seed: int, choice: int, token_index: int) -> tuple[int, int]:
    """The two 32-bit words that key one draw; the same on every machine, thread and attempt."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{token_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def check_ids(sampling: Sampling, history: Sequence[int], vocab_size: int) -> str | None:
    """What is wrong with the ids of a row, if anything: an id outside the vocabulary would write out of bounds."""
    for what, ids in (("logit_bias", [i for i, _ in sampling.logit_bias]), ("history", history)):
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            return f"{what} names token {bad}; this model's ids are 0…{vocab_size - 1}"
    return None


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature <= 0 or sampling.top_k == 1


def _allow(logits: mx.array, limits: Limits) -> mx.array:
    if len(limits.rows) == logits.shape[0]:
        return mx.minimum(logits, limits.values)
    at_rows = mx.array(limits.rows)
    result = logits + 0  # an update in place would change the raw values
    result[at_rows] = mx.minimum(logits[at_rows], limits.values)
    return result


def _adjust(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """Bias and penalties, at the few positions that they touch."""
    rows: list[int] = []
    ids: list[int] = []
    bias: list[float] = []
    factor: list[float] = []
    minus: list[float] = []
    for row, draw in enumerate(draws):
        s = draw.sampling
        biases: dict[int, float] = {}
        for token, value in s.logit_bias:
            biases[token] = biases.get(token, 0.0) + value
        seen = draw.seen if s.repetition_penalty != 1 else ()
        emitted = draw.emitted if s.presence_penalty or s.frequency_penalty else Counter[int]()
        for token in biases.keys() | set(seen) | emitted.keys():
            rows.append(row)
            ids.append(token)
            bias.append(biases.get(token, 0.0))
            factor.append(s.repetition_penalty if token in seen else 1.0)
            count = emitted[token]
            minus.append(s.presence_penalty * (count > 0) + s.frequency_penalty * count)
    if not rows:
        return logits
    where = (mx.array(rows), mx.array(ids))
    values = logits[where] + mx.array(bias)
    penalty = mx.array(factor)
    values = mx.where(values < 0, values * penalty, values / penalty) - mx.array(minus)
    # An update in place would change the caller's array, whose raw values the log probabilities need.
    result = logits + 0
    result[where] = values
    return result


def _draw(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """Filtered, tempered and keyed draws; every row's parameters differ, so they are columns."""
    kept = _filter(logits, [draw.sampling for draw in draws])
    temperature = _column(draws, lambda s: s.temperature)
    keys = np.array([draw_key(d.sampling.seed, d.choice, d.token_index) for d in draws], dtype=np.uint32)
    one_row = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
    return one_row(kept / temperature, mx.array(keys)).astype(mx.int32)


def _filter(logits: mx.array, parameters: Sequence[Sampling]) -> mx.array:
    """Logits with -inf below each row's threshold: the strictest of top-k, min-p and top-p."""
    vocab = logits.shape[-1]
    threshold: mx.array | None = None

    def at_least(value: mx.array) -> None:
        nonlocal threshold
        threshold = value if threshold is None else mx.maximum(threshold, value)

    if any(s.min_p > 0 for s in parameters):
        log_min_p = mx.array([[np.log(s.min_p) if s.min_p > 0 else -np.inf] for s in parameters], dtype=mx.float32)
        at_least(mx.max(logits, axis=-1, keepdims=True) + log_min_p)
    limits = [s.top_k if 0 < s.top_k < vocab else vocab for s in parameters]
    if any(limit < vocab or s.top_p < 1 for limit, s in zip(limits, parameters, strict=True)):
        at_least(_rank_threshold(logits, parameters, limits))
    return logits if threshold is None else mx.where(logits < threshold, -mx.inf, logits)


def _rank_threshold(logits: mx.array, parameters: Sequence[Sampling], limits: list[int]) -> mx.array:
    """The smallest logit that top-k and top-p let through, per row.

    A sort of a whole vocabulary is the dearest thing here (10 ms per row of 152k on a CPU core), so when every row
    that filters has a top-k only the largest of these k are sorted.
    """
    vocab = logits.shape[-1]
    asks = [limit if limit < vocab or s.top_p < 1 else 1 for limit, s in zip(limits, parameters, strict=True)]
    depth = max(asks)
    largest = logits if depth == vocab else mx.topk(logits, depth, axis=-1)
    ranked = mx.sort(largest, axis=-1)[:, ::-1]
    mass = mx.exp(ranked - mx.logsumexp(logits, axis=-1, keepdims=True))
    above = mx.cumsum(mass, axis=-1) - mass
    rank = mx.arange(depth)[None]
    top_p = mx.array([[s.top_p if s.top_p < 1 else np.inf] for s in parameters], dtype=mx.float32)
    passes = (rank == 0) | ((rank < mx.array(limits)[:, None]) & (above < top_p))
    lowest = mx.min(mx.where(passes, ranked, mx.inf), axis=-1, keepdims=True)
    filters = mx.array([[limit < vocab or s.top_p < 1] for limit, s in zip(limits, parameters, strict=True)])
    return mx.where(filters, lowest, -mx.inf)


def with_logprobs(raw: mx.array, tokens: mx.array) -> Drawn:
    """``tokens`` with their log probabilities in ``raw`` logits (lines, vocabulary), and the best alternatives."""
    logprobs = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
    # Always as many as anybody may ask for, so that ties come out alike whatever the neighbours want.
    count = min(MAX_TOP_LOGPROBS, raw.shape[-1])
    candidates = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logprobs, candidates, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return Drawn(
        tokens,
        mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0],
        mx.take_along_axis(candidates, order, axis=-1),
        mx.take_along_axis(values, order, axis=-1),
    )


def _column(draws: Sequence[Draw], value: Callable[[Sampling], float]) -> mx.array:
    return mx.array([[value(draw.sampling)] for draw in draws], dtype=mx.float32)
