"""From tokens to pieces, without an engine: pure, so tried with many cuts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.errors import ClusterError
from mlx_cluster.gateway.choice import Choice, Piece
from mlx_cluster.request import Token
from mlx_cluster.tokenizer import StopMatcher, Tokenizer


def run(choice: Choice, ids: list[int] | tuple[int, ...]) -> list[Piece]:
    pieces: list[Piece] = []
    for index, token_id in enumerate(ids):
        pieces += choice.push(Token(index, token_id))
        if choice.stopped:
            return pieces
    return pieces + choice.finish()


@given(
    text=st.text("abST👋é ", max_size=24),
    stops=st.lists(st.text("abST👋", min_size=1, max_size=3), max_size=3),
    every_token=st.booleans(),
)
def test_the_pieces_are_the_text_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str], every_token: bool
) -> None:
    ids = tokenizer.encode(text)
    choice = Choice(tokenizer, stop=stops, every_token=every_token)
    pieces = run(choice, ids)
    expected, hit = StopMatcher(stops).push(text)
    if not hit:
        expected = text
    assert "".join(piece.text for piece in pieces) == expected
    assert choice.stopped == hit
    sources = [piece.token.index for piece in pieces if piece.token is not None]
    assert sources == sorted(set(sources))  # at most one piece per token, in order
    if every_token and not hit:
        assert sources == list(range(len(ids)))


def test_a_stop_string_that_begins_inside_a_token_cuts_its_piece(tokenizer: Tokenizer) -> None:
    pieces = run(Choice(tokenizer, stop=["lo w"]), tokenizer.encode("hello world"))
    assert [piece.text for piece in pieces] == ["hel"]


def test_a_stop_id_has_no_text(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, stop_token_ids=frozenset(tokenizer.encode("b")), every_token=True)
    assert [piece.text for piece in run(choice, tokenizer.encode("ab"))] == ["a"]
    assert len(choice.emitted) == 2


@pytest.mark.parametrize("index", [0, 2])
def test_a_repeated_or_skipped_token_is_an_error(tokenizer: Tokenizer, index: int) -> None:
    choice = Choice(tokenizer)
    choice.push(Token(0, 5))
    with pytest.raises(ClusterError, match=f"sent token {index} where token 1 was due"):
        choice.push(Token(index, 5))
