"""The table: refusals with their reason, and where a model may be cut."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_cluster.errors import CheckpointError, PlanError, UnsupportedModel
from mlx_cluster.model import families, graph
from mlx_cluster.model.slice import ModelSlice
from tests.tiny_models import build_tiny, tiny_config


@pytest.mark.parametrize("name", ["iquestloopcoder", "nanbeige", "afm7", "gemma3n"])
def test_refused_families_say_why(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"type {name} cannot be cut into slices: .{{20,}}; choose"):
        families.legal_cuts({"model_type": name, "num_hidden_layers": 4})


def test_a_family_without_a_row_is_cut_anywhere() -> None:
    assert families.legal_cuts({"model_type": "qwen2", "num_hidden_layers": 5}) == [1, 2, 3, 4]


def test_layers_that_share_keys_and_values_stay_together() -> None:
    """Layers 4 and 5 read those of layers 3 (sliding) and 2 (full)."""
    config = tiny_config("gemma4_text", layers=6)
    assert families.legal_cuts(config) == [1, 2]
    families.check_slice(config, 2, 6)
    with pytest.raises(PlanError, match=r"cannot be cut before layer 4.*cut at 1, 2"):
        families.check_slice(config, 2, 4)


def test_the_graph_refuses_the_cuts_that_the_table_forbids() -> None:
    """Two sources, one truth: what the configuration says and what the model's own graph reads."""
    legal = families.legal_cuts(tiny_config("gemma4_text", layers=9))
    allowed = []
    for cut in range(1, 9):
        model = build_tiny("gemma4_text", layers=9)
        try:
            crossing = graph.crossing(model, graph.trace(model), cut)
        except (PlanError, TypeError, ValueError, AttributeError):
            continue
        if crossing == (0,):
            allowed.append(cut)
    assert allowed == legal


def test_hunyuan_is_cut_between_runs_of_shared_attention() -> None:
    config = {"model_type": "hunyuan", "num_hidden_layers": 6, "use_cla": True, "cla_share_factor": 2}
    assert families.legal_cuts(config) == [2, 4]
    assert families.legal_cuts({**config, "use_cla": False}) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 1), (0, 7)])
def test_a_range_outside_the_model_is_refused(start: int, end: int) -> None:
    with pytest.raises(PlanError, match="6 layers"):
        families.check_slice(tiny_config("qwen2", layers=6), start, end)


def test_a_model_that_runs_its_layers_twice_is_refused() -> None:
    """Detected in the graph, for families that no row of the table names."""
    model = build_tiny("qwen2", layers=2)
    inner = model.model
    layers = inner.layers

    class Looped(type(inner)):  # type: ignore[misc]
        def __call__(self, tokens: mx.array, cache: list[object], *_: object) -> mx.array:
            hidden = self.embed_tokens(tokens)
            for _loop in range(2):
                for layer in layers:
                    hidden = layer(hidden, None, None)
            return self.norm(hidden)

    inner.__class__ = Looped
    with pytest.raises(UnsupportedModel, match="calls its 2 layers 4 times"):
        ModelSlice(model, 0, 1)


def test_a_configuration_without_layers_or_type_is_named() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        families.num_layers({"model_type": "qwen2"})
    with pytest.raises(CheckpointError, match="model_type"):
        families.family_of({})


def test_the_language_model_inside_a_larger_configuration_counts() -> None:
    config = {"model_type": "x", "text_config": {"num_hidden_layers": 7, "max_position_embeddings": 99}}
    assert families.num_layers(config) == 7
    assert families.max_context(config) == 99
    assert families.max_context({"model_type": "mamba"}) == families.DEFAULT_MAX_CONTEXT
