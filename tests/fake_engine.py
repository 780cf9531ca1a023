"""A scripted engine and routing table, at the real seam (``request.Engine``, ``request.Routes``), and tiny tokenizers.

Owns: engines whose tokens, pace and failures a test decides; a record of what was asked and what was cancelled.
Does not own: any computation. Nothing here sleeps: a held engine waits until the test lets it go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_cluster.errors import ClusterError, Unavailable
from mlx_cluster.request import (
    Admitted,
    Engine,
    Event,
    Finished,
    FinishReason,
    Scored,
    SequenceRequest,
    ServedModel,
    Token,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse me' %}{{ raise_exception('this template refuses that') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Script:
    """What the engine does with one sequence.

    ``tokens``: ids to emit (it stops at ``max_tokens`` and stop ids by itself, as a real engine does).
    ``refuse``: raised before admission. ``fail_after``: (number of tokens, error). ``finish``: overrides the reason.
    ``admit`` and ``go``: when given, admission waits for the event and every token for one permit.
    ``ends_early``: the stream ends without ``Finished``.
    """

    tokens: Sequence[int] = ()
    refuse: BaseException | None = None
    fail_after: tuple[int, BaseException] | None = None
    finish: FinishReason | None = None
    admit: asyncio.Event | None = None
    go: asyncio.Semaphore | None = None
    cached_tokens: int = 0
    ends_early: bool = False
    pooled: Callable[[SequenceRequest], tuple[float, ...]] = lambda request: (1.0, float(len(request.prompt)))


@dataclass
class ScriptedEngine:
    """Implements ``request.Engine``. ``script`` is one for all sequences, or made for each."""

    script: Script | Callable[[SequenceRequest], Script] = field(default_factory=Script)
    requests: list[SequenceRequest] = field(default_factory=list)
    cancelled: list[tuple[str, int]] = field(default_factory=list)
    finished: list[tuple[str, int]] = field(default_factory=list)
    num_emitted: int = 0

    def __post_init__(self) -> None:
        self.changed = asyncio.Condition()

    async def until(self, predicate: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until something this engine records makes ``predicate`` true."""
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(predicate)

    async def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        script = self.script if isinstance(self.script, Script) else self.script(request)
        key = (request.request_id, request.choice)
        await self._note(lambda: self.requests.append(request))
        ended = False
        try:
            if script.refuse is not None:
                raise script.refuse
            if script.admit is not None:
                await script.admit.wait()
            yield Admitted(cached_tokens=script.cached_tokens)
            if request.prompt_logprobs is not None:
                told = tuple(
                    self._token(request, at, id_, request.prompt_logprobs) for at, id_ in enumerate(request.prompt)
                )[1:]
                yield Scored(told[:2])  # as chunks bring them
                yield Scored(told[2:])
            if request.pool is not None:
                ended = True
                yield Finished("stop", len(request.prompt), 0, pooled=script.pooled(request))
                await self._note(lambda: self.finished.append(key))
                return
            reason: FinishReason = "length"
            count = len(request.emitted)
            for token_id in script.tokens[count:]:
                if script.fail_after is not None and count == script.fail_after[0]:
                    raise script.fail_after[1]
                if count == request.max_tokens:
                    break
                if script.go is not None:
                    await script.go.acquire()
                yield self._token(request, count, token_id)
                count += 1
                self.num_emitted += 1
                if token_id in request.stop_token_ids:
                    reason = "stop"
                    break
            if script.fail_after is not None and count <= script.fail_after[0]:
                raise script.fail_after[1]
            ended = True
            if not script.ends_early:
                yield Finished(script.finish or reason, len(request.prompt), count, script.cached_tokens)
            await self._note(lambda: self.finished.append(key))
        except ClusterError:
            ended = True
            raise
        finally:
            if not ended:
                self.cancelled.append(key)
                # Closing must not wait for a lock that a waiting test holds.
                self._telling = asyncio.create_task(self._note(lambda: None))

    def _token(self, request: SequenceRequest, index: int, token_id: int, wanted: int | None = None) -> Token:
        """Log probabilities are made up, but a function of the id: -id/100, and one less for each alternative."""
        wanted = request.sampling.top_logprobs if wanted is None else wanted
        if wanted is None:
            return Token(index, token_id)
        logprob = -token_id / 100
        return Token(index, token_id, logprob, tuple((token_id + k, logprob - k) for k in range(wanted)))

    async def _note(self, change: Callable[[], None]) -> None:
        change()
        async with self.changed:
            self.changed.notify_all()


@dataclass
class ScriptedRoutes:
    """Implements ``request.Routes`` over a fixed set of models."""

    served: list[ServedModel]
    engines: dict[str, Engine]

    def models(self) -> list[ServedModel]:
        return list(self.served)

    def engine_for(self, model_id: str) -> Engine:
        model = next(model for model in self.served if model.id == model_id)
        if model.state != "ready":
            raise Unavailable(f"{model_id!r} is {model.state}: {model.detail}", retry_after_seconds=3.0)
        return self.engines[model_id]


def served_model(model_dir: Path | str, **changes: object) -> ServedModel:
    values: dict[str, object] = {
        "id": "tiny",
        "aliases": ("gpt-tiny",),
        "model_dir": str(model_dir),
        "max_context": 512,
        "created": 1_700_000_000,
        "state": "ready",
    }
    return ServedModel(**{**values, **changes})  # type: ignore[arg-type]


def write_byte_level_tokenizer(
    directory: Path,
    *,
    merges: Iterable[tuple[str, str]] = (),
    chat_template: str | None = CHAT_TEMPLATE,
    more_special: Sequence[str] = (),
) -> Path:
    """A byte-level BPE tokenizer: three special tokens, 256 bytes, and the given merges. ``<|im_end|>`` ends."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = list(merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet, *("".join(merge) for merge in merges), *more_special]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL_TOKENS, *more_special)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    return _write(directory, tokenizer, config)


def write_byte_fallback_tokenizer(directory: Path) -> Path:
    """A SentencePiece-like tokenizer: words with ``▁``, and ``<0xNN>`` for bytes of unknown characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁h", "el", "lo"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("▁", "h"), ("e", "l"), ("l", "o")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<unk>")])
    return _write(directory, tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})


def _write(directory: Path, tokenizer: object, config: dict[str, str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))  # type: ignore[attr-defined]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
