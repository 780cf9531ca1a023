"""The prompt as a part of its answer: its text, and the log probabilities of its own tokens where they are asked for.

Owns: collecting what an engine says of the prompt, until the choice's first token shows that it was all.
Does not own: how a dialect prints it (``completions_dialect``).
Invariant: each choice echoes once, before any of its own text; a token that is told twice (by a second attempt) counts
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_cluster.request import Token


@dataclass(frozen=True, slots=True)
class Echoed:
    """The prompt of one choice: its ids, and those of its tokens whose log probability is known."""

    choice: int
    prompt: tuple[int, ...]
    scored: tuple[Token, ...]


class Echoes:
    def __init__(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """``prompts``: of each choice; empty when nothing is echoed."""
        self._prompts = dict(enumerate(prompts))
        self._scored: dict[int, list[Token]] = {}

    def note(self, choice: int, tokens: Sequence[Token]) -> None:
        known = self._scored.setdefault(choice, [])
        last = known[-1].index if known else 0
        known += [token for token in tokens if token.index > last]

    def take(self, choice: int) -> list[Echoed]:
        """What there is to show in front of this choice now: once its echo, then nothing."""
        prompt = self._prompts.pop(choice, None)
        return [] if prompt is None else [Echoed(choice, prompt, tuple(self._scored.pop(choice, ())))]
