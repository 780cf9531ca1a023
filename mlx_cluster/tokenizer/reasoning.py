"""Reasoning: how a model marks what it thinks before it answers.

Owns: the known pairs of markers, and whether a rendered prompt has already opened one.
Does not own: splitting an answer (the gateway does).
Invariant: a model without markers is read as text alone.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands before and after the reasoning."""

    start: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends inside the reasoning, as templates make it that let a model think at once."""
        start = prompt.rfind(self.start)
        return start >= 0 and start > prompt.rfind(self.end) and not prompt[start + len(self.start) :].strip()


# A pair counts when both are tokens of the model, or its template names both.
KNOWN = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<longcat_think>", "</longcat_think>"),
    Markers("<|think:start|>", "<|think:end|>"),
    Markers("<|channel>thought", "<channel|>"),
)


def find_markers(template: str, vocabulary: Container[str]) -> Markers | None:
    """The markers of a model with this chat template and these tokens."""
    for pair in KNOWN:
        tokens = (pair.start.removesuffix("thought"), pair.end)
        if all(token in vocabulary for token in tokens) or all(token in template for token in (pair.start, pair.end)):
            return pair
    return None
