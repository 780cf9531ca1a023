"""Tokenizers from real files: templates, end tokens, and decoding that never breaks a character."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cluster.errors import CheckpointError, InvalidRequest
from mlx_cluster.tokenizer import IncrementalDecoder, Tokenizer, load
from tests.fake_engine import write_byte_fallback_tokenizer, write_byte_level_tokenizer

TEXT = "Grüße, 世界 👋🏽! naïve café\n\ttabs and  spaces"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_byte_level_tokenizer(tmp_path_factory.mktemp("byte_level"), merges=[("Ð", "¿"), ("a", "n")]))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_byte_fallback_tokenizer(tmp_path_factory.mktemp("byte_fallback")))


def chunks_of(decoder: IncrementalDecoder, ids: list[int] | tuple[int, ...]) -> list[str]:
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def test_text_survives_a_round_trip_in_whole_characters(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXT)
    chunks = chunks_of(byte_level.decoder(), ids)
    assert "".join(chunks) == TEXT
    assert "\ufffd" not in "".join(chunks)
    assert len(ids) > len(TEXT)  # so characters really were split over tokens


def test_a_character_appears_with_the_token_that_completes_it(byte_level: Tokenizer) -> None:
    assert chunks_of(byte_level.decoder(), byte_level.encode("a👋b")) == ["a", "", "", "", "👋", "b", ""]


def test_a_sequence_that_ends_inside_a_character_shows_one_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a👋")[:-1]
    assert chunks_of(byte_level.decoder(), ids) == ["a", "", "", "", "\ufffd"]


@given(ids=st.lists(st.integers(min_value=0, max_value=300), max_size=40))
def test_any_ids_decode_as_all_their_bytes_at_once(byte_level: Tokenizer, ids: list[int]) -> None:
    special = set(range(3))
    whole = b"".join(byte_level.token_bytes(token_id) for token_id in ids if token_id not in special)
    assert "".join(chunks_of(byte_level.decoder(), ids)) == whole.decode("utf-8", "replace")


def test_bytes_of_ids(byte_level: Tokenizer) -> None:
    assert b"".join(byte_level.token_bytes(token_id) for token_id in byte_level.encode(TEXT)) == TEXT.encode()
    end = next(iter(byte_level.eos_token_ids))
    assert byte_level.token_text(end) == "<|im_end|>"
    assert byte_level.decoder().push(end) == ""
    assert byte_level.token_bytes(byte_level.vocab_size + 5) == b""


def test_byte_fallback_round_trip(byte_fallback: Tokenizer) -> None:
    text = "hello lohel 世界👋 hi"
    chunks = chunks_of(byte_fallback.decoder(), byte_fallback.encode(text))
    assert "".join(chunks) == text
    assert all("\ufffd" not in chunk for chunk in chunks)


@given(words=st.lists(st.sampled_from(["hello", "lo", "世", "👋", "h", "é", "x y"]), min_size=1, max_size=8))
def test_byte_fallback_chunks_are_the_whole_text(byte_fallback: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    assert "".join(chunks_of(byte_fallback.decoder(), byte_fallback.encode(text))) == text


def test_invalid_bytes_for_ever_do_not_hold_text_for_ever(byte_fallback: Tokenizer) -> None:
    decoder = byte_fallback.decoder()
    lead_byte = 3 + 0xF0
    chunks = [decoder.push(lead_byte) for _ in range(100)]
    assert sum(map(len, chunks)) >= 80


def test_special_tokens_in_the_middle_keep_the_space_after_them(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("hello hello")
    assert "".join(chunks_of(byte_fallback.decoder(), (*ids[:3], 1, *ids[3:], 1))) == "hello hello"


def test_a_conversation_is_rendered_for_the_assistants_turn(byte_level: Tokenizer) -> None:
    ids = byte_level.render_chat([{"role": "user", "content": "Hi 👋"}])
    text = b"".join(byte_level.token_bytes(token_id) for token_id in ids).decode()
    assert text == "<|im_start|>user\nHi 👋<|im_end|>\n<|im_start|>assistant\n"
    assert [token_id for token_id in ids if token_id < 3] == [1, 2, 1]  # special tokens as such, not as text


def test_a_template_that_refuses_is_the_clients_error(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="this template refuses that") as caught:
        byte_level.render_chat([{"role": "user", "content": "refuse me"}])
    assert caught.value.param == "messages"


def test_a_model_without_template_says_what_to_use(byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        byte_fallback.render_chat([{"role": "user", "content": "hi"}])


def test_the_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    directory = write_byte_level_tokenizer(tmp_path)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 99}))
    assert load(directory).eos_token_ids == {2, 99}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load(directory).eos_token_ids == {0, 2}


def test_truncation_in_the_file_is_switched_off(tmp_path: Path) -> None:
    directory = write_byte_level_tokenizer(tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert len(load(directory).encode("a long text")) == len("a long text")


def test_a_directory_without_tokenizer_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        load(tmp_path / "nowhere")


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    directory = write_byte_level_tokenizer(tmp_path)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(directory)


def test_code_in_the_model_directory_is_not_run(tmp_path: Path) -> None:
    directory = write_byte_level_tokenizer(tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    with contextlib.suppress(CheckpointError):
        load(directory)
    assert not (tmp_path / "ran").exists()


def test_importing_the_package_is_cheap() -> None:
    heavy = "import sys, mlx_cluster.tokenizer; print([m for m in ('transformers', 'mlx.core') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=60).stdout == "[]\n"
