"""Model directories: what is refused, with which remedy; hash and costs from headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_cluster.errors import CheckpointError, UnsupportedModel
from mlx_cluster.model import checkpoint
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "qwen2", layers=4, width=32, vocab=300, shards=2)


@pytest.fixture
def model_dir(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def test_a_whole_checkpoint_is_accepted(model_dir: Path) -> None:
    checkpoint.validate(model_dir)
    assert checkpoint.num_layers(model_dir) == 4
    assert checkpoint.max_context(checkpoint.load_config(model_dir)) == 4096


SHARD = "model-00002-of-00002.safetensors"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, keep_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:keep_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json does not exist.*download the model again"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read.*download the model again"),
        (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda d: edit_config(d, model_type=None), "names no model_type"),
        (lambda d: edit_config(d, num_hidden_layers=0), "no number of layers"),
        (lambda d: edit_config(d, model_file="evil.py"), "its own Python code .evil.py., which is never run"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing, though the index names it"),
        (lambda d: [p.unlink() for p in d.glob("*.safetensors")], "only safetensors weights are loaded"),
        (lambda d: cut(d / SHARD, -10), "bytes, its header promises"),
        (lambda d: cut(d / SHARD, 100), "cut off inside its header"),
        (lambda d: cut(d / SHARD, 3), "cut off after 3 bytes"),
        (lambda d: (d / SHARD).write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]"), "malformed safetensors header"),
        (lambda d: (d / SHARD).write_bytes(b"\xff" * 64), "no safetensors file"),
        (lambda d: (d / "model.safetensors.index.json").write_text("nonsense"), "index.json cannot be read"),
    ],
)
def test_damage_is_named_with_its_file_and_remedy(
    model_dir: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(model_dir)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.validate(model_dir)


def test_a_tensor_that_only_the_index_knows_is_named(model_dir: Path) -> None:
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.lost"] = SHARD
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.lost is in the index but not in"):
        checkpoint.validate(model_dir)


def test_a_refused_family_is_refused_before_any_weight_is_looked_at(model_dir: Path) -> None:
    edit_config(model_dir, model_type="gemma3n")
    with pytest.raises(UnsupportedModel, match="gemma3n"):
        checkpoint.validate(model_dir)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        checkpoint.validate(tmp_path / "nothing")


def test_the_manifest_hash_is_of_content_not_of_paths(pristine: Path, model_dir: Path) -> None:
    same = checkpoint.manifest_hash(pristine)
    assert checkpoint.manifest_hash(model_dir) == same
    edit_config(model_dir, rope_theta=5.0)
    assert checkpoint.manifest_hash(model_dir) != same
    shutil.copy(pristine / "config.json", model_dir / "config.json")
    shard = model_dir / SHARD
    weights = dict(mx.load(str(shard)))  # type: ignore[arg-type]
    weights["model.layers.3.extra"] = mx.zeros((4,))
    mx.save_safetensors(str(shard), weights, metadata={"format": "mlx"})
    assert checkpoint.manifest_hash(model_dir) != same


@pytest.mark.parametrize(
    ("family", "bits"), [("qwen2", None), ("qwen2/untied", None), ("qwen2", 4), ("qwen2/untied", 8), ("gemma2", None)]
)
def test_costs_are_the_bytes_of_the_loaded_model(tmp_path: Path, family: str, bits: int | None) -> None:
    model_dir = write_tiny_model(
        tmp_path / "m", layers=3, width=64, vocab=320, family=family, quantize_bits=bits, dtype="float16"
    )
    costs = checkpoint.layer_costs(model_dir)
    model, _ = load_model(model_dir)
    in_memory = {name: array.nbytes for name, array in tree_flatten(model.parameters())}
    of_layer = [sum(size for name, size in in_memory.items() if f"layers.{i}." in name) for i in range(3)]
    assert [layer.stored_bytes for layer in costs.layers] == of_layer
    assert costs.embedding.stored_bytes == sum(size for name, size in in_memory.items() if "embed" in name)
    assert costs.slice(0, 3).stored_bytes == sum(in_memory.values())
    assert costs.tied == (family != "qwen2/untied")
    middle, last = costs.slice(1, 2), costs.slice(2, 3)
    assert middle == costs.layers[1]
    assert last.stored_bytes == of_layer[2] + costs.head.stored_bytes + costs.tied * costs.embedding.stored_bytes


@pytest.mark.parametrize("bits", [None, 4])
def test_dense_bytes_are_those_of_float32(tmp_path: Path, bits: int | None) -> None:
    stored = write_tiny_model(tmp_path / "stored", layers=2, width=64, vocab=320, quantize_bits=bits, dtype="float16")
    dense = write_tiny_model(tmp_path / "dense", layers=2, width=64, vocab=320, dtype="float32")
    assert (
        checkpoint.layer_costs(stored).slice(0, 2).dense_bytes == checkpoint.layer_costs(dense).slice(0, 2).stored_bytes
    )


def test_models_are_found_by_directory_by_name_and_in_the_hub_cache(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert checkpoint.resolve_local(str(pristine)) == pristine.resolve()
    assert checkpoint.resolve_local("qwen2", [pristine.parent]) == pristine.resolve()
    assert checkpoint.resolve_local("somebody/qwen2", [pristine.parent]) == pristine.resolve()
    with pytest.raises(CheckpointError, match=r"'somebody/qwen2' is not on this machine .looked at .*model_dirs"):
        checkpoint.resolve_local("somebody/qwen2")
    repository = tmp_path / "hub" / "models--somebody--qwen2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(pristine, repository / "snapshots" / "abc")
    assert checkpoint.resolve_local("somebody/qwen2").name == "abc"


def test_key_and_value_bytes_of_one_position() -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    assert checkpoint.kv_bytes_per_token(config, 2) == 2 * 2 * 8 * 2
    wide = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 8 * 64}
    assert checkpoint.kv_bytes_per_token(wide, kv_bits=8) == 2 * 2 * (64 + 8)
    assert checkpoint.kv_bytes_per_token(wide, kv_bits=4, kv_group_size=32) == 2 * 2 * (32 + 16)


def test_planning_does_not_import_mlx() -> None:
    """Agents never compute, and importing mlx costs them memory and start-up time."""
    program = (
        "import sys; import mlx_cluster.model.checkpoint, mlx_cluster.model.families, mlx_cluster.model.hub; "
        "sys.exit(any(name.partition('.')[0] in ('mlx', 'mlx_lm', 'huggingface_hub') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("said", "pool"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
        ({"pooling_mode_cls_token": True}, None),
        ([], None),
        (None, None),
    ],
)
def test_a_checkpoint_says_how_its_states_become_embeddings(tmp_path: Path, said: Any, pool: str | None) -> None:
    if said is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert checkpoint.pooling(tmp_path) == pool
