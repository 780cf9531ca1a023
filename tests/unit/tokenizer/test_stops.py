"""Stop strings: nothing of one is ever shown, and the cut does not depend on the chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.tokenizer import StopMatcher


def shown(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = ""
    for chunk in chunks:
        released, hit = matcher.push(chunk)
        text += released
        if hit:
            return text, True
    return text + matcher.flush(), False


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """Character by character: the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


def test_a_stop_string_across_three_chunks_is_never_shown() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("text <") == ("text ", False)
    assert matcher.push("/en") == ("", False)
    assert matcher.push("d> more") == ("", True)
    assert matcher.push("still more") == ("", True)
    assert matcher.flush() == ""


def test_text_held_back_is_released_when_it_does_not_become_a_stop_string() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("<") == ("", False)
    assert matcher.push("b>") == ("<b>", False)


def test_text_held_back_is_released_at_the_end() -> None:
    assert shown(["stop"], ["a st"]) == ("a st", False)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    chunks=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_the_result_does_not_depend_on_the_chunks(stops: list[str], chunks: list[str]) -> None:
    assert shown(stops, chunks) == reference(stops, "".join(chunks))
