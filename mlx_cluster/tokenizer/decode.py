"""Token ids to text, one id at a time.

Owns: the two ways to decode incrementally: by bytes (byte-level BPE, exact and cheap) and by windows (all others).
Does not own: stop strings (``stops``).
Invariant: no chunk ends inside a character; the chunks and ``flush`` together are the text of all ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"

# A character has at most four bytes, so a window that still ends in a replacement character after this many tokens
# will not become valid: it is shown as it is, and the window stays short.
MAX_HELD_TOKENS = 16


class IncrementalDecoder(Protocol):
    """Decodes one sequence."""

    def push(self, token_id: int) -> str:
        """Text that this id completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left when the sequence ends in the middle of a character (replacement characters)."""
        ...


class ByteDecoder:
    """For byte-level BPE, where every id stands for fixed bytes."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other tokenizer: decode the last shown ids with and without the new ones, and show the difference.

    The context matters because an id's text may depend on what stands before it (SentencePiece drops the first space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skip: frozenset[int] = frozenset()) -> None:
        self._decode = decode
        self._skip = skip
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._decode(self._context + self._pending)) if self._pending else ""

    def _show(self, text: str) -> str:
        shown = text[len(self._context_text) :]
        if shown or len(self._pending) >= MAX_HELD_TOKENS:
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return shown


class NamingDecoder:
    """Shows the names of some special tokens, which mark parts of an answer; all else is ``inner``'s."""

    def __init__(self, inner: IncrementalDecoder, names: Mapping[int, str]) -> None:
        self._inner = inner
        self._names = names

    def push(self, token_id: int) -> str:
        name = self._names.get(token_id)
        return self._inner.push(token_id) if name is None else self._inner.flush() + name

    def flush(self) -> str:
        return self._inner.flush()


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2 introduced it)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in set(printable)]
    table.update({chr(256 + index): value for index, value in enumerate(others)})
    return table
