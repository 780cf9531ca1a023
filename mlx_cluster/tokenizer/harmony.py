"""The harmony form: the special tokens around the messages of an answer, and which models write it.

Owns: their names. Does not own: reading an answer (the gateway).
Invariant: a model counts when it has all of these tokens and its template names the channels.
"""

from __future__ import annotations

from collections.abc import Container

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL, CONSTRAIN = "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"
MARKS = (START, CHANNEL, MESSAGE, END, RETURN, CALL, CONSTRAIN)


def is_harmony(template: str, vocabulary: Container[str]) -> bool:
    """Whether a model with this chat template and these tokens answers in this form."""
    return all(mark in vocabulary for mark in MARKS) and CHANNEL in template and MESSAGE in template
