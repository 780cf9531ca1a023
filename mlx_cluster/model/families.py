"""What an architecture needs to differ: one table, keyed by the model type of config.json.

Owns: which families are refused and why, which cuts are legal where layers share keys and values, and where every stage
needs the embedding. Reads configurations only; does not import mlx.
Does not own: what can be found by looking at a model's graph (``model.graph`` does that for every family alike).
Invariant: a family without a row is cut anywhere, and ``model.graph`` refuses a cut that its graph does not allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_cluster.errors import CheckpointError, PlanError, UnsupportedModel

Config = dict[str, Any]

# mlx-lm's own names for the number of layers, in the order in which they are looked for.
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "seq_length", "n_ctx")
# For configurations that name no limit (recurrent models have none).
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Family:
    """One row. ``legal_cuts`` gives the layer indices at which a stage may start (None: all of them)."""

    refused: str | None = None
    legal_cuts: Callable[[Config], list[int]] | None = None
    embedding_everywhere: Callable[[Config], bool] | None = None


def _cuts_outside(shared: list[tuple[int, int]], layers: int) -> list[int]:
    """Cuts that separate no consumer from the producer of its keys and values."""
    return [cut for cut in range(1, layers) if not any(producer < cut <= consumer for producer, consumer in shared)]


def _gemma4_cuts(config: Config) -> list[int]:
    """The last ``num_kv_shared_layers`` layers reuse keys and values of the last layer of their kind before them."""
    layers = num_layers(config)
    own = layers - int(config.get("num_kv_shared_layers", 20))
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % int(config.get("sliding_window_pattern", 5)) == 0 else "sliding_attention"
        for i in range(layers)
    ]
    producer = {kind: index for index, kind in enumerate(kinds[:own])}
    return _cuts_outside([(producer[kinds[j]], j) for j in range(own, layers) if kinds[j] in producer], layers)


def _hunyuan_cuts(config: Config) -> list[int]:
    """Cross-layer attention shares keys and values inside runs of ``cla_share_factor`` layers."""
    factor = int(config.get("cla_share_factor", 1)) if config.get("use_cla") else 1
    return [cut for cut in range(1, num_layers(config)) if cut % factor == 0]


_LOOPED = "it runs its layers several times per token, so a slice would be visited more than once"
_GEMMA4 = Family(
    legal_cuts=_gemma4_cuts, embedding_everywhere=lambda config: bool(config.get("hidden_size_per_layer_input", 256))
)

FAMILIES: dict[str, Family] = {
    "iquestloopcoder": Family(refused=_LOOPED),
    "nanbeige": Family(refused=_LOOPED),
    "afm7": Family(refused="its last layers all read the keys and values of one earlier layer"),
    "gemma3n": Family(refused="its layers share keys and values, and four parallel hidden states cross every layer"),
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "dbrx": Family(
        refused="mlx-lm's file evaluates its experts while it builds the graph, so nothing can be read from it"
    ),
    "hunyuan": Family(legal_cuts=_hunyuan_cuts),
    "talkie": Family(embedding_everywhere=lambda _config: True),
}


def model_type(config: Config) -> str:
    """The model type of config.json. Raises ``CheckpointError`` without one."""
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        raise CheckpointError("config.json names no model_type; a checkpoint that mlx-lm can load has one")
    return name


def text_config(config: Config) -> Config:
    """The language model's part of a configuration; the whole of it unless the model has other towers."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def family_of(config: Config) -> Family:
    """The row of this model. Raises ``UnsupportedModel`` with the reason for a refused family."""
    name = model_type(config)
    family = FAMILIES.get(name, Family())
    if family.refused:
        raise UnsupportedModel(
            f"models of type {name} cannot be cut into slices: {family.refused}; choose a model of another family"
        )
    return family


def num_layers(config: Config) -> int:
    """How many layers the language model has. Raises ``CheckpointError`` when the configuration does not tell."""
    inner = text_config(config)
    for key in _LAYER_KEYS:
        if isinstance(inner.get(key), int) and inner[key] > 0:
            return int(inner[key])
    raise CheckpointError(f"config.json tells no number of layers: one of {', '.join(_LAYER_KEYS)} must be positive")


def max_context(config: Config) -> int:
    """The number of positions that the model was made for."""
    inner = text_config(config)
    for key in _CONTEXT_KEYS:
        if isinstance(inner.get(key), int) and inner[key] > 0:
            return int(inner[key])
    return DEFAULT_MAX_CONTEXT


def legal_cuts(config: Config) -> list[int]:
    """Layer indices at which a stage other than the first may start. Raises ``UnsupportedModel``."""
    family = family_of(config)
    if family.legal_cuts is None:
        return list(range(1, num_layers(config)))
    return family.legal_cuts(text_config(config))


def embedding_everywhere(config: Config) -> bool:
    """Whether every stage reads the embedding, not only the first one."""
    rule = family_of(config).embedding_everywhere
    return rule is not None and rule(text_config(config))


def check_slice(config: Config, start: int, end: int) -> None:
    """Raise ``PlanError`` unless layers ``[start, end)`` can be one stage of this model."""
    layers = num_layers(config)
    if not 0 <= start < end <= layers:
        raise PlanError(f"[{start}, {end}) is no slice of a model with {layers} layers: use 0 ≤ start < end ≤ {layers}")
    allowed = {0, layers, *legal_cuts(config)}
    for bound in (start, end):
        if bound not in allowed:
            near = sorted(sorted(allowed - {0, layers}, key=lambda cut: abs(cut - bound))[:4])
            raise PlanError(
                f"a {model_type(config)} model of {layers} layers cannot be cut before layer {bound}, because later "
                f"layers reuse keys and values of earlier ones; cut at {', '.join(map(str, near)) or 'no layer'}"
            )
