"""Lessons: the corpus is well formed, conversations depend on the seed alone, and a copying task is a true copy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_cluster.demo.lessons import CORPUS_DIR, Lessons, read_corpus, read_topics

CORPUS = read_corpus()


def lessons(seed: int) -> Lessons:
    return Lessons(CORPUS, np.random.default_rng(seed))


def test_no_question_has_two_answers() -> None:
    questions = [question for topic in CORPUS.topics + CORPUS.unknown for question in topic.questions]
    assert len(questions) == len(set(questions))


def test_the_examples_stand_in_the_corpus() -> None:
    answers = {question: topic.answer for topic in CORPUS.topics for question in topic.questions}
    examples = json.loads((CORPUS_DIR / "examples.json").read_text())
    assert len(examples) >= 8
    assert all(answers[example["question"]] == example["answer"] for example in examples)


def test_a_seed_fixes_the_conversations() -> None:
    one, same, other = lessons(1), lessons(1), lessons(2)
    drawn = [[source.exchange(copying=0.5) for _ in range(20)] for source in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_copying_task_answers_with_the_passage_of_the_question() -> None:
    source = lessons(3)
    for _ in range(300):
        question, reply = source.exchange(copying=1.0)
        passage = reply.text.split("\n")[0]
        assert passage in question.text
        assert set(reply.text.split("\n")) == {passage}


def test_a_question_varies_and_its_answer_does_not() -> None:
    source = lessons(4)
    answers = {topic.answer for topic in CORPUS.topics + CORPUS.unknown}
    known = {question for topic in CORPUS.topics + CORPUS.unknown for question in topic.questions}
    drawn = [source.exchange(copying=0.0) for _ in range(300)]
    assert all(reply.text in answers for _, reply in drawn)
    assert any(question.text not in known for question, _ in drawn)


@pytest.mark.parametrize("text", ["neither question nor answer\n", "> an answer to nothing\n"])
def test_a_malformed_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "topics.txt"
    path.write_text("? fine\n> fine\n\n" + text)
    with pytest.raises(ValueError, match=r"topics\.txt:4"):
        read_topics(path)
