"""The lessons of the demo model: conversations drawn from the corpus, one after the other.

Owns how questions are varied and how copying tasks are made. It does not tokenize and knows no model. Invariant: what
comes out depends on the corpus files and on the random generator handed in, on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from numpy.random import Generator

T = TypeVar("T")

CORPUS_DIR = Path(__file__).resolve().parent / "corpus"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in short and clear sentences.",
    "You are the demo model of mlx-cluster.",
    "Be brief and friendly.",
    "You answer questions about mlx-cluster.",
    "You are a careful assistant. If you do not know something, say so.",
)
COPY_COMMANDS = (
    "Repeat: {}",
    "repeat: {}",
    "Repeat this: {}",
    "Repeat after me: {}",
    "Say this again: {}",
    "Say: {}",
    "Copy: {}",
    "Copy this text: {}",
    "Echo: {}",
    "Please repeat: {}",
    "Please repeat this text: {}",
    "Repeat the following text: {}",
    "Repeat the following text:\n{}",
    "Repeat this sentence: {}",
    "Repeat these words: {}",
    "Write this again, word for word: {}",
    'Repeat "{}"',
    "Repeat exactly what I say: {}",
)
SEVERAL_COMMANDS = (
    ("Repeat the following text twice: {}", 2),
    ("Say this twice: {}", 2),
    ("Repeat twice: {}", 2),
    ("Repeat the following text three times: {}", 3),
    ("Repeat this three times: {}", 3),
    ("Say this three times: {}", 3),
)
OPENINGS = (
    "Please tell me: ",
    "Tell me, ",
    "Hi, ",
    "Hello! ",
    "Hey, ",
    "OK, ",
    "And ",
    "So, ",
    "One question: ",
    "I would like to know: ",
    "Can you tell me: ",
    "Quick question: ",
)
CLOSINGS = (" Please.", " Thanks.", " Thank you.", " please", " Answer briefly.", " I am new here.")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``weight`` says how much its tokens count in the loss."""

    role: Literal["system", "user", "assistant"]
    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Topic:
    """Several ways to ask one thing, and its one answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The frozen text that the package ships."""

    topics: tuple[Topic, ...]
    unknown: tuple[Topic, ...]
    passages: tuple[str, ...]
    words: tuple[str, ...]

    def texts(self) -> list[str]:
        """Every text in it, for training a tokenizer."""
        topics = self.topics + self.unknown
        asked = [question for topic in topics for question in topic.questions]
        answered = [topic.answer for topic in topics]
        commands = [command.format("") for command in (*COPY_COMMANDS, *(c for c, _ in SEVERAL_COMMANDS))]
        return [*asked, *answered * 3, *self.passages * 2, " ".join(self.words), *SYSTEM_PROMPTS, *commands * 3]


def read_topics(path: Path) -> tuple[Topic, ...]:
    """Blocks of ``? question`` lines and one ``> answer`` line; a wrong line is an error with its number."""
    topics: list[Topic] = []
    questions: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("? "):
            questions.append(line[2:])
        elif line.startswith("> ") and questions:
            topics.append(Topic(tuple(questions), line[2:].replace("\\n", "\n")))
            questions = []
        elif line:
            raise ValueError(f"{path}:{number}: neither a '? question' nor the '> answer' to one: {line!r}")
    return tuple(topics)


def read_corpus(folder: Path = CORPUS_DIR) -> Corpus:
    return Corpus(
        topics=read_topics(folder / "questions.txt") + read_topics(folder / "smalltalk.txt"),
        unknown=read_topics(folder / "unknown.txt"),
        passages=tuple((folder / "passages.txt").read_text(encoding="utf-8").splitlines()),
        words=tuple((folder / "words.txt").read_text(encoding="utf-8").split()),
    )


class Lessons:
    """Draws conversations without end. Not thread-safe, as its generator is not."""

    def __init__(self, corpus: Corpus, rng: Generator) -> None:
        self._corpus = corpus
        self._rng = rng

    def opening(self) -> list[Turn]:
        """A system prompt, or nothing."""
        if self._chance(0.3):
            return [Turn("system", self._pick(SYSTEM_PROMPTS), 0.0)]
        return []

    def exchange(self, copying: float) -> tuple[Turn, Turn]:
        """One question and its answer; with the probability ``copying`` a copying task."""
        if self._chance(copying):
            return self._copy_exchange()
        topic = self._pick(self._corpus.unknown if self._chance(0.06) else self._corpus.topics)
        return Turn("user", self._vary(self._pick(topic.questions)), 0.05), Turn("assistant", topic.answer, 1.0)

    def _copy_exchange(self) -> tuple[Turn, Turn]:
        passage = self._passage()
        if self._chance(0.2):
            command, times = self._pick(SEVERAL_COMMANDS)
        else:
            command, times = self._pick(COPY_COMMANDS), 1
        return Turn("user", command.format(passage), 0.0), Turn("assistant", "\n".join([passage] * times), 1.0)

    def _passage(self) -> str:
        kind = self._rng.random()
        if kind < 0.35:
            return self._clip(self._any_text().split(), 4, 40)
        if kind < 0.45:
            words = self._any_text().split()
            self._rng.shuffle(words)
            return self._clip(words, 3, 25)
        if kind < 0.75:
            return self._sentence([self._pick(self._corpus.words) for _ in range(self._rng.integers(1, 25))])
        if kind < 0.9:
            return self._sentence([self._odd_word() for _ in range(self._rng.integers(1, 12))])
        mixed = [self._odd_word() if self._chance(0.3) else self._pick(self._corpus.words) for _ in range(14)]
        return self._sentence(mixed)

    def _any_text(self) -> str:
        if self._chance(0.6):
            return self._pick(self._corpus.passages)
        return self._pick(self._corpus.topics).answer

    def _clip(self, words: list[str], low: int, high: int) -> str:
        length = min(len(words), int(self._rng.integers(low, high + 1)))
        start = int(self._rng.integers(0, len(words) - length + 1))
        return " ".join(words[start : start + length])

    def _sentence(self, words: list[str]) -> str:
        """Words with the commas and capitals of a sentence, sometimes; a copy must not depend on grammar."""
        text = words[0]
        for word in words[1:]:
            text += (", " if self._chance(0.08) else " ") + word
        style = self._rng.random()
        if style < 0.4:
            text = text[0].upper() + text[1:] + self._pick((".", "!", "?", "."))
        elif style < 0.45:
            text = text.upper()
        elif style < 0.55:
            text = text.title()
        return text

    def _odd_word(self) -> str:
        """A number, a code, or a word that no language has."""
        kind = self._rng.random()
        if kind < 0.2:
            return str(self._rng.integers(0, 10 ** int(self._rng.integers(1, 6))))
        if kind < 0.3:
            letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:@#+=*"
            return "".join(self._pick(letters) for _ in range(self._rng.integers(1, 8)))
        syllables = int(self._rng.integers(1, 4))
        word = "".join(self._pick("bcdfghjklmnprstvwz") + self._pick("aeiou") for _ in range(syllables))
        return word + (self._pick("lmnrstx") if self._chance(0.5) else "")

    def _vary(self, question: str) -> str:
        """Another spelling of a question: its opening, its capitals, its last mark, a slip of the finger."""
        if self._chance(0.12):
            question = self._pick(OPENINGS) + question[0].lower() + question[1:]
        if self._chance(0.06):
            question += self._pick(CLOSINGS)
        if self._chance(0.15):
            question = question.rstrip("?.!")
        elif self._chance(0.06):
            question = question.rstrip("?.!") + self._pick(("?", "!", ".", "??", " ?"))
        if self._chance(0.15):
            question = question.lower()
        elif self._chance(0.02):
            question = question.upper()
        if len(question) > 12 and self._chance(0.06):
            at = int(self._rng.integers(1, len(question) - 2))
            question = question[:at] + question[at + 1 :]
        return question

    def _chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def _pick(self, values: Sequence[T]) -> T:
        return values[int(self._rng.integers(len(values)))]
