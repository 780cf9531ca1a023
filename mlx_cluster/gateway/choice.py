"""One choice of an answer: from its tokens to the text a client may see.

Owns: the decoder, the stop strings and the order of the pieces of one sequence.
Does not own: the engine's stream or the clock (``session``). Pure: the same tokens always give the same pieces.
Invariant: the pieces' texts together are the decoded tokens up to the first stop string or stop id, and a token's piece
comes when all its text may be shown, so one token is at most one piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_cluster.errors import ClusterError
from mlx_cluster.request import Token
from mlx_cluster.tokenizer import StopMatcher, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to show, and the token it came from (None for what is left over when a sequence ends mid-character)."""

    text: str
    token: Token | None


class Choice:
    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        stop_token_ids: frozenset[int] = frozenset(),
        every_token: bool = False,
        markers: Sequence[str] = (),
    ) -> None:
        """``every_token``: give a piece for tokens without text too (for their log probabilities).

        ``markers`` are shown although they may be special tokens.
        """
        self.emitted: list[int] = []
        self._decoder = tokenizer.decoder(markers)
        self._stops = StopMatcher(stop)
        self._stop_token_ids = stop_token_ids
        self._every_token = every_token
        self._queue: deque[Piece] = deque()
        self._may_show = 0  # characters at the queue's front that are no part of a stop string

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: nothing more will be shown."""
        return self._stops.hit

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met."""
        return self._stops.matched

    def push(self, token: Token) -> list[Piece]:
        """Pieces that may be shown after this token."""
        if token.index != len(self.emitted):
            raise ClusterError(f"the engine sent token {token.index} where token {len(self.emitted)} was due")
        self.emitted.append(token.token_id)
        if token.token_id in self._stop_token_ids:
            return []  # it ends the sequence and is no part of the text
        text = self._decoder.push(token.token_id)
        if not text and not self._every_token:
            return []
        return self._accept(Piece(text, token))

    def finish(self) -> list[Piece]:
        """What was held back, now that no token is to come."""
        rest = self._decoder.flush()
        shown = self._accept(Piece(rest, None)) if rest else []
        self._may_show += len(self._stops.flush())
        return shown + self._release()

    def _accept(self, piece: Piece) -> list[Piece]:
        released, hit = self._stops.push(piece.text)
        self._queue.append(piece)
        self._may_show += len(released)
        shown = self._release()
        if hit and self._queue:
            if self._may_show:  # the stop string began inside this token's text
                cut = self._queue[0]
                shown.append(Piece(cut.text[: self._may_show], cut.token))
            self._queue.clear()
            self._may_show = 0
        return shown

    def _release(self) -> list[Piece]:
        shown: list[Piece] = []
        while self._queue and len(self._queue[0].text) <= self._may_show:
            piece = self._queue.popleft()
            self._may_show -= len(piece.text)
            shown.append(piece)
        return shown
