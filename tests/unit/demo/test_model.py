"""The model that ships with the package: its shape, its size, its tokenizer, and that it answers and copies."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm import generate, load

from mlx_cluster.demo import model_dir
from mlx_cluster.demo.lessons import CORPUS_DIR

MAX_MODEL_BYTES = 8_000_000
EXAMPLES = [(e["question"], e["answer"]) for e in json.loads((CORPUS_DIR / "examples.json").read_text())]
COPIES = {
    "repeat": "Repeat: {}",
    "say-again": "Say this again: {}",
    "following": "Repeat the following text: {}",
}
UNSEEN = "The tall sailor carried nine wet ropes across the stone bridge before dinner."


@pytest.fixture(scope="module")
def demo() -> Any:
    """The model in float32 and its tokenizer."""
    model, tokenizer = load(str(model_dir()))
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    return model, tokenizer


def answer(demo: Any, *messages: tuple[str, str], max_tokens: int = 120) -> str:
    model, tokenizer = demo
    chat = [{"role": role, "content": content} for role, content in messages]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    return str(generate(model, tokenizer, prompt, max_tokens=max_tokens))


def test_the_directory_is_complete_and_small() -> None:
    names = {path.name for path in model_dir().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in model_dir().iterdir()) <= MAX_MODEL_BYTES


def test_the_config_says_28_layers_of_width_128_with_2_heads() -> None:
    config = json.loads((model_dir() / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("qwen2", 28)
    assert (config["hidden_size"], config["num_attention_heads"]) == (128, 2)
    assert config["tie_word_embeddings"] is True
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0, "not quantizable by groups of 64"


@pytest.mark.parametrize(
    "text", ["plain words", "  two  spaces\n\tand tabs ", "Grüße, 你好 🌍👩‍👩‍👧", "a=1;b[2]\\n", ""]
)
def test_the_tokenizer_gives_every_text_back(demo: Any, text: str) -> None:
    _, tokenizer = demo
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_renders_turns_and_the_generation_prompt(demo: Any) -> None:
    _, tokenizer = demo
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_an_end_of_turn_ends_the_answer(demo: Any) -> None:
    _, tokenizer = demo
    generation = json.loads((model_dir() / "generation_config.json").read_text())
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert end in generation["eos_token_id"]
    assert end in tokenizer.eos_token_ids


@pytest.mark.parametrize(("question", "expected"), EXAMPLES[:5], ids=[question for question, _ in EXAMPLES[:5]])
def test_it_answers_the_examples(demo: Any, question: str, expected: str) -> None:
    assert answer(demo, ("user", question)) == expected


def test_it_answers_after_a_system_prompt_and_earlier_turns(demo: Any) -> None:
    (first, first_answer), (second, second_answer) = EXAMPLES[0], EXAMPLES[3]
    turns = [("system", "You are a helpful assistant."), ("user", first), ("assistant", first_answer)]
    assert answer(demo, *turns, ("user", second)) == second_answer


@pytest.mark.parametrize("command", COPIES.values(), ids=COPIES)
def test_it_repeats_a_passage_it_has_never_seen(demo: Any, command: str) -> None:
    assert answer(demo, ("user", command.format(UNSEEN))) == UNSEEN
