from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_cluster.config.schema import Settings
from mlx_cluster.errors import CheckpointError
from mlx_cluster.model import checkpoint
from mlx_cluster.node.models import LocalModels
from tests.unit.cluster.builders import plan


def local(model: dict[str, Any], **sections: Any) -> LocalModels:
    settings = Settings.model_validate(
        {"cluster": {"nodes": [{"host": "mini1.local", "node_id": 0}]}, "models": {"tiny": model}, **sections}
    )
    return LocalModels(settings, settings.cluster.nodes[0])


async def test_facts_come_from_this_nodes_own_directory(tiny_model: Path) -> None:
    models = local({"path": str(tiny_model)}, runtime={"device": "cpu"})
    assert await models.refresh()
    assert not await models.refresh()
    (facts,) = models.facts
    costs = checkpoint.layer_costs(tiny_model)
    assert (facts.id, facts.num_layers, facts.max_context) == ("tiny", 6, 4096)
    assert facts.manifest_hash == checkpoint.manifest_hash(tiny_model)
    assert facts.layer_bytes == tuple(cost.stored_bytes for cost in costs.layers)
    assert (facts.head_bytes, facts.tied) == (costs.head.stored_bytes, True), "the last stage holds the embedding too"
    assert facts.legal_cuts is None, "any cut is legal"
    assert facts.dense_ratio == facts.least_ratio == 1.0, "float32 on disk, float32 in memory"
    assert models.missing == ()


async def test_a_model_is_found_by_its_name_in_the_nodes_folders(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    models = local({}, nodes={"mini1": {"model_dirs": [str(tmp_path)]}})
    await models.refresh()
    found = models.get("tiny")
    assert found is not None
    assert found.directory == tmp_path / "tiny"


async def test_a_missing_model_says_where_it_was_looked_for_and_is_found_later(
    tiny_model: Path, tmp_path: Path
) -> None:
    models = local({"path": str(tmp_path / "tiny")})
    assert not await models.refresh()
    assert models.get("tiny") is None
    ((model, why),) = models.missing
    assert model == "tiny"
    assert str(tmp_path / "tiny") in why
    with pytest.raises(CheckpointError, match="cannot load tiny"):
        models.directory_for(plan({0: 6}))
    shutil.copytree(tiny_model, tmp_path / "tiny")
    assert await models.refresh()
    assert models.missing == ()


async def test_another_manifest_than_the_plans_is_refused_with_both(tiny_model: Path) -> None:
    models = local({"path": str(tiny_model)})
    await models.refresh()
    own = models.facts[0].manifest_hash
    assert models.directory_for(plan({0: 6}, manifest_hash=own)) == tiny_model
    with pytest.raises(CheckpointError, match=rf"manifest {own}, the plan wants another"):
        models.directory_for(plan({0: 6}, manifest_hash="another"))


async def test_the_operators_word_on_layers_and_context_counts(tiny_model: Path) -> None:
    models = local({"path": str(tiny_model), "total_layers": 28})
    await models.refresh()
    assert "has 6 layers, models.tiny.total_layers says 28" in dict(models.missing)["tiny"]
    models = local({"path": str(tiny_model), "max_context": 64})
    await models.refresh()
    assert models.facts[0].max_context == 64


async def test_half_precision_doubles_on_a_cpu_and_not_on_a_gpu(tiny_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    file = half / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for entry in header.values():  # two float16 values where one float32 was
        if "dtype" in entry:
            entry["dtype"], entry["shape"] = "F16", [*entry["shape"][:-1], entry["shape"][-1] * 2]
    fresh = json.dumps(header).encode()
    file.write_bytes(len(fresh).to_bytes(8, "little") + fresh + raw[8 + length :])
    for device, ratio in (("cpu", 2.0), ("gpu", 1.0)):
        models = local({"path": str(half)}, runtime={"device": device})
        await models.refresh()
        assert (models.facts[0].dense_ratio, models.facts[0].least_ratio) == (ratio, ratio)
