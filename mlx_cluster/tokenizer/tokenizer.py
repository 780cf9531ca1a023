"""One model's tokenizer, loaded from its directory.

Owns: encoding, the chat template, which ids end a sequence, the text of single ids.
Does not own: when and in which thread it is loaded (``load`` takes seconds: keep it off the event loop).
Invariant: nothing from the model directory is executed (no remote code; templates run in Jinja's sandbox), nothing is
fetched, and after ``load`` the tokenizer is only read, so several threads may use it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_cluster.errors import CheckpointError, InvalidRequest
from mlx_cluster.tokenizer.decode import (
    ByteDecoder,
    IncrementalDecoder,
    NamingDecoder,
    WindowDecoder,
    byte_alphabet,
)
from mlx_cluster.tokenizer.fim import FimTokens, find_fim
from mlx_cluster.tokenizer.harmony import is_harmony
from mlx_cluster.tokenizer.reasoning import Markers, find_markers
from mlx_cluster.tokenizer.tools import ToolFormat, find_format


class Tokenizer:
    """Wraps a tokenizer of transformers. Make one with ``load``."""

    def __init__(self, inner: Any, eos_token_ids: frozenset[int]) -> None:
        self._inner = inner
        self._backend = getattr(inner, "backend_tokenizer", None)
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = len(inner)
        self.has_chat_template: bool = inner.chat_template is not None
        self._added: dict[int, Any] = dict(inner.added_tokens_decoder)
        self._special = frozenset(inner.all_special_ids) | {id_ for id_, token in self._added.items() if token.special}
        self.template = template = _template_text(inner.chat_template)
        vocabulary = inner.get_vocab()
        self.reasoning: Markers | None = find_markers(template, vocabulary)
        self.harmony: bool = is_harmony(template, vocabulary)
        self.fim: FimTokens | None = find_fim(vocabulary)
        self.tool_format: ToolFormat | None = find_format(template, vocabulary)
        self.template_names: frozenset[str] = frozenset(re.findall(r"[A-Za-z_]\w*", template))
        self._alphabet = byte_alphabet() if _is_byte_level(self._backend) else None
        self.has_grammars: bool = self._backend is not None
        self._bytes: dict[int, bytes] = {}
        if self._backend is not None:
            # Some files switch truncation on. Off here, once: switching later would change the tokenizer under
            # the feet of another thread.
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of plain text, with the special tokens that the tokenizer puts around it (such as BOS)."""
        return tuple(self._inner.encode(text, add_special_tokens=add_special_tokens))

    def fill_in(self, prefix: Sequence[int], suffix: str) -> tuple[int, ...]:
        """The prompt that asks for what belongs between the ids of ``prefix`` and ``suffix``.

        Raises ``InvalidRequest`` when the model has no tokens for it.
        """
        if self.fim is None:
            raise InvalidRequest(
                "suffix: this model has no tokens to fill in the middle; leave the field out, or ask a code model",
                param="suffix",
                code="unsupported_parameter",
            )
        before, between, after = self._inner.convert_tokens_to_ids([self.fim.before, self.fim.between, self.fim.after])
        return (before, *prefix, between, *self.encode(suffix, add_special_tokens=False), after)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_values: Any) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer. See ``chat_text``."""
        return self.encode(self.chat_text(messages, **template_values), add_special_tokens=False)

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], *, continues: bool = False, **template_values: Any
    ) -> str:
        """The text of a conversation, ready for the assistant's answer. It is encoded without special tokens.

        With ``continues`` the last message is the answer's own beginning. ``template_values`` go to the template as
        they are. Raises ``InvalidRequest`` when the model has no chat template or its template refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions with a prompt of your own",
                param="messages",
                code="no_chat_template",
            )
        try:
            return str(
                self._inner.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=not continues,
                    continue_final_message=continues,
                    **template_values,
                )
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # A template is a small program: what it does not foresee surfaces as any of these.
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages", code="chat_template"
            ) from error

    def decoder(self, markers: Sequence[str] = ()) -> IncrementalDecoder:
        """A decoder for one sequence. Special tokens have no text, except those that are part of a marker."""
        inner: IncrementalDecoder
        if self._alphabet is not None:
            inner = ByteDecoder(self._shown_bytes)
        else:
            inner = WindowDecoder(self._decode_window, self._special)
        names = {id_: self.token_text(id_) for id_ in self._special} if markers else {}
        shown = {id_: name for id_, name in names.items() if any(name in marker for marker in markers)}
        return NamingDecoder(inner, shown) if shown else inner

    def special_id(self, text: str) -> int | None:
        """The id of ``text`` when it is one of the special tokens, which are no text to a grammar."""
        return next((id_ for id_ in self._special if self.token_text(id_) == text), None)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id by itself, special tokens by their name; empty for an id outside the vocabulary."""
        cached = self._bytes.get(token_id)
        if cached is None:
            cached = self._bytes[token_id] = self._compute_bytes(token_id)
        return cached

    def token_text(self, token_id: int) -> str:
        """The text of one id by itself; an incomplete character becomes a replacement character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def _compute_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            return b""  # embeddings are often padded beyond the vocabulary
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if self._alphabet is None:
            return str(self._inner.decode([token_id])).encode()
        piece = self._inner.convert_ids_to_tokens(token_id) or ""
        alphabet = self._alphabet
        return b"".join(bytes([alphabet[char]]) if char in alphabet else char.encode() for char in piece)

    def _decode_window(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=True))
        return str(self._inner.decode(list(ids), skip_special_tokens=True))


def load(model_dir: str | Path) -> Tokenizer:
    """Load the tokenizer of a model directory. Takes seconds the first time; call it off the event loop.

    Raises ``CheckpointError`` when the directory has no tokenizer that works without the model author's code.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: a gateway needs the model's tokenizer files there")
    # Before the first import: transformers would announce on standard error that PyTorch is missing, and tokenizers
    # would warn in every child process. One text at a time has no use for its threads.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        # trust_remote_code must be said: left out, transformers asks on the terminal.
        inner = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError, ImportError) as error:
        raise CheckpointError(
            f"no usable tokenizer in {directory}: {error}; tokenizer.json and tokenizer_config.json belong there"
        ) from error
    return Tokenizer(inner, _eos_token_ids(directory, inner.eos_token_id))


def _eos_token_ids(directory: Path, own: int | None) -> frozenset[int]:
    """The tokenizer's own end token and those of generation_config.json (or else config.json), as mlx-lm has them."""
    ids = {own} if own is not None else set()
    for name in ("generation_config.json", "config.json"):
        listed = _read_json(directory / name).get("eos_token_id")
        if listed is not None:
            return frozenset(ids | ({listed} if isinstance(listed, int) else set(listed)))
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _template_text(template: Any) -> str:
    """The source of a chat template; of all of them where a model has several."""
    if isinstance(template, Mapping):
        return "\n".join(str(source) for source in template.values())
    return template if isinstance(template, str) else ""


def _is_byte_level(backend: Any) -> bool:
    if backend is None:
        return False
    from tokenizers.decoders import ByteLevel

    return isinstance(backend.decoder, ByteLevel)
