"""Filling in the middle: how a model is given what stands before and after the text that it is to write.

Owns: the known sets of special tokens, and which of them a model has.
Does not own: the ids around a prompt (``Tokenizer.fill_in``).
Invariant: a model that lacks one of the tokens of a set is not taken to know it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FimTokens:
    """What stands before the prefix, between prefix and suffix, and where the model goes on."""

    before: str
    between: str
    after: str


KNOWN = (
    FimTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    FimTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    FimTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    FimTokens("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    FimTokens("▁<PRE>", "▁<SUF>", "▁<MID>"),
    FimTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


def find_fim(vocabulary: Container[str]) -> FimTokens | None:
    """The set that this vocabulary has, if any."""
    return next((k for k in KNOWN if all(name in vocabulary for name in (k.before, k.between, k.after))), None)
