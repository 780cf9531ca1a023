"""Grammar masks: which tokens a row may draw next.

Owns: llguidance's view of the model's tokenizer, one matcher per row that has a grammar, the bit masks.
Does not own: applying a mask to logits (``sampling``), what grammars there are (``mlx_cluster.grammar``).
Invariant: a matcher has consumed exactly what its row emitted; the row's stop tokens are in its mask exactly where the
grammar may end, and no other token that ends a text is in it ever.

Tokenizer and matchers are built on a thread of their own while prompts are computed: a large vocabulary takes most of
a second, a large schema tens of milliseconds. llguidance lets other Python threads run meanwhile.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from mlx_cluster.errors import CheckpointError, RowFailed
from mlx_cluster.grammar import to_llguidance
from mlx_cluster.request import Grammar

# What a row's first mask waits for at most; a grammar within the bounds takes far less.
COMPILE_SECONDS = 30.0
# Compiled grammars that are kept: choices of one request share theirs, and clients send the same schema again.
MAX_KEPT = 32


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: LLMatcher
    vocab_size: int  # of the tokenizer: what the mask covers
    ends: tuple[int, ...]  # tokens that llguidance takes for the end of a text


class Grammars:
    """Compiles the grammars of one model. ``vocab_size`` is the width of its logits."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # belongs to the thread
        self._executor: LLExecutor | None = None  # made for the first step that has several rows with grammars

    def warm_up(self) -> None:
        """Begin to load the tokenizer, without waiting for it."""
        if self._tokenizer is None:
            self._tokenizer = self._thread.submit(_load_tokenizer, self._model_dir, self._vocab_size)

    def begin(self, grammar: Grammar, emitted: Sequence[int], stop_token_ids: Sequence[int]) -> RowGrammar:
        """A row's grammar, compiled in the background; ``emitted`` are ids that an earlier attempt delivered."""
        self.warm_up()
        assert self._tokenizer is not None
        tokenizer = self._tokenizer
        compiled = self._thread.submit(lambda: self._compile(tokenizer.result(), grammar, emitted))
        return RowGrammar(compiled, tuple(stop_token_ids))

    def masks(self, rows: Sequence[RowGrammar]) -> list[NDArray[np.uint32] | RowFailed]:
        """What ``mask`` gives or raises, for several rows at once, on all cores."""
        if len(rows) < 2:
            return [_mask_or_error(row) for row in rows]
        ready: list[tuple[int, _Compiled]] = []
        results: list[NDArray[np.uint32] | RowFailed] = []
        for index, row in enumerate(rows):
            try:
                ready.append((index, row.compiled()))
                results.append(np.empty(0, np.uint32))
            except RowFailed as error:
                results.append(error)
        if not ready:
            return results
        words = np.zeros((len(ready), -(-ready[0][1].vocab_size // 32)), np.uint32)
        if self._executor is None:
            self._executor = LLExecutor(os.cpu_count())
        matchers = [(compiled.matcher, at) for at, (_, compiled) in enumerate(ready)]
        self._executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, words[0].nbytes, len(ready))
        for at, (index, _) in enumerate(ready):
            try:
                results[index] = rows[index].finished(words[at])
            except RowFailed as error:
                results[index] = error
        return results

    def _compile(self, tokenizer: LLTokenizer, grammar: Grammar, emitted: Sequence[int]) -> _Compiled:
        """A matcher of the row's own. Raises ``ValueError``."""
        made = self._compiled.pop(grammar, None) or LLMatcher(tokenizer, to_llguidance(grammar), log_level=0)
        if made.is_error():
            raise ValueError(made.get_error())
        self._compiled[grammar] = made
        while len(self._compiled) > MAX_KEPT:
            self._compiled.popitem(last=False)
        matcher = made.deep_copy()
        if not matcher.consume_tokens(list(emitted)):
            raise ValueError(matcher.get_error() or "what was emitted already does not follow it")
        return _Compiled(matcher, tokenizer.vocab_size, tuple(tokenizer.eos_tokens))


class RowGrammar:
    """One row's state. Used by the thread that owns mlx."""

    def __init__(self, compiled: Future[_Compiled], stop_token_ids: tuple[int, ...]) -> None:
        self._future = compiled
        self._stop_token_ids = stop_token_ids

    def consume(self, token_id: int) -> None:
        """The row emitted this token. Raises ``RowFailed`` when the grammar does not allow it."""
        matcher = self.compiled().matcher
        if not matcher.consume_token(token_id):
            raise RowFailed(f"the grammar does not allow token {token_id}: {matcher.get_error() or 'it has ended'}")

    def masks(self, draft: Sequence[int]) -> list[NDArray[np.uint32]]:
        """The mask of the next token, and those behind each token of a draft as far as the grammar allows it.

        The state stays where it is. Raises ``RowFailed`` when no token may come next.
        """
        masks = [self.mask()]
        matcher, consumed = self.compiled().matcher, 0
        try:
            for token in draft:
                if matcher.try_consume_tokens([token]) != 1:
                    break
                consumed += 1
                masks.append(self.mask())
        except RowFailed:
            pass  # it cannot go on behind this token; whether it comes to that is not said yet
        finally:
            matcher.rollback(consumed)
        return masks

    def mask(self) -> NDArray[np.uint32]:
        """The mask of the next token: bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may be drawn.

        Raises ``RowFailed`` when no token may.
        """
        compiled = self.compiled()
        words = np.zeros(-(-compiled.vocab_size // 32), np.uint32)
        compiled.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return self.finished(words)

    def finished(self, words: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """llguidance's mask with the tokens that end this row's text. Raises ``RowFailed`` as ``mask`` does."""
        compiled = self.compiled()
        matcher = compiled.matcher
        if matcher.is_error():
            raise RowFailed(f"the grammar of this row cannot go on: {matcher.get_error()}")
        for token in compiled.ends:
            words[token // 32] &= ~np.uint32(1 << (token % 32))
        if matcher.is_accepting():
            for token in self._stop_token_ids:
                if token < compiled.vocab_size:
                    words[token // 32] |= np.uint32(1 << (token % 32))
        if not words.any():
            raise RowFailed("the grammar allows no further token here, and the request has no stop token")
        return words

    def compiled(self) -> _Compiled:
        """Waits for the thread that compiles. Raises ``RowFailed``."""
        try:
            return self._future.result(COMPILE_SECONDS)
        except TimeoutError:
            raise RowFailed(f"the grammar was not compiled within {COMPILE_SECONDS:g} s: make it smaller") from None
        except (ValueError, CheckpointError) as error:
            raise RowFailed(f"the grammar cannot be compiled: {error}") from None


def _mask_or_error(row: RowGrammar) -> NDArray[np.uint32] | RowFailed:
    try:
        return row.mask()
    except RowFailed as error:
        return error


def _load_tokenizer(model_dir: Path, vocab_size: int) -> LLTokenizer:
    """llguidance's tokenizer, as wide as the logits: embeddings are often padded beyond the vocabulary.

    Raises ``CheckpointError`` when the directory has no tokenizer.json.
    """
    values = _read(model_dir / "tokenizer.json")
    if not values:
        raise CheckpointError(f"{model_dir} has no readable tokenizer.json, which structured output needs")
    # Some checkpoints name added tokens in tokenizer_config.json alone.
    known = {token["id"] for token in values.setdefault("added_tokens", [])}
    for key, token in _read(model_dir / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        if int(key) not in known:
            flags = {
                name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            values["added_tokens"].append({"id": int(key), "content": token["content"], **flags})
    pieces = values.get("model", {}).get("vocab", ())
    width = max([vocab_size, len(pieces), *(token["id"] + 1 for token in values["added_tokens"])])
    try:
        return LLTokenizer(json.dumps(values), n_vocab=width, eos_token=_end_tokens(model_dir) or None)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"llguidance cannot read the tokenizer in {model_dir}: {error}") from error


def _end_tokens(model_dir: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        listed = _read(model_dir / name).get("eos_token_id")
        if listed is not None:
            return [listed] if isinstance(listed, int) else list(listed)
    return []


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
