"""Tiny random models for tests: configurations of many families, and real mlx-lm checkpoints written to a folder.

Owns: ``tiny_config``, ``build_tiny`` (a model in memory) and ``write_tiny_model`` (config, weights, tokenizer on disk).
Invariant: the same arguments give the same weights; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

BYTE_VOCAB = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB = BYTE_VOCAB + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(family: str, *, layers: int = 6, width: int = 64, vocab: int = 320) -> dict[str, Any]:
    """A configuration of this family that builds in milliseconds. A suffix after "/" names a variant."""
    base: dict[str, Any] = {
        "model_type": family.partition("/")[0],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return {**base, **_EXTRAS[family](layers, width)}


def _moe(_layers: int, width: int) -> dict[str, Any]:
    return {
        "head_dim": width // 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }


def _head_dim(**more: Any) -> Any:
    return lambda _layers, width: {"head_dim": width // 4, **more}


def _fixed(**more: Any) -> Any:
    return lambda _layers, _width: dict(more)


def _gemma4(layers: int, width: int) -> dict[str, Any]:
    """Two sliding layers per full one; the last third reuses keys and values of earlier layers."""
    return {
        "head_dim": width // 4,
        "global_head_dim": width // 2,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "layer_types": ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
        "num_kv_shared_layers": layers // 3,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "use_double_wide_mlp": False,
    }


_EXTRAS: dict[str, Any] = {
    "qwen2": _fixed(),
    "qwen2/untied": _fixed(tie_word_embeddings=False),
    "qwen3": _head_dim(tie_word_embeddings=False),
    "llama": _fixed(tie_word_embeddings=False),
    "llama/sliding": lambda layers, _width: {
        "layer_types": ["full_attention"] + ["sliding_attention"] * (layers - 1),
        "sliding_window": 6,
        "tie_word_embeddings": False,
    },
    "gemma": _head_dim(),
    "gemma2": _head_dim(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=16.0),
    "gemma3_text": _head_dim(sliding_window=6, sliding_window_pattern=3, query_pre_attn_scalar=16),
    "gemma4_text": _gemma4,
    "phi": _fixed(num_key_value_heads=4),
    "phi3": _fixed(original_max_position_embeddings=4096),
    "gpt_oss": _head_dim(num_local_experts=4, num_experts_per_tok=2, sliding_window=6, rope_scaling=None),
    "qwen3_moe": _moe,
    "mixtral": _fixed(num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _fixed(
        moe_intermediate_size=64,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        qk_nope_head_dim=16,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        first_k_dense_replace=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        moe_layer_freq=1,
        attention_bias=False,
    ),
    "glm4": _head_dim(attention_bias=True, partial_rotary_factor=0.5),
    "qwen3_next": _fixed(
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=3,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0],
        moe_intermediate_size=64,
        head_dim=32,
        partial_rotary_factor=0.5,
        full_attention_interval=4,
    ),
    "cohere": _fixed(logit_scale=0.0625),
    "cohere2": _head_dim(sliding_window=6, sliding_window_pattern=3),
    "gpt2": lambda layers, width: {
        "n_ctx": 512,
        "n_embd": width,
        "n_head": 4,
        "n_layer": layers,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": _fixed(layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.25),
    "granite": _fixed(
        logits_scaling=8.0,
        attention_multiplier=0.25,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_bias=False,
        mlp_bias=False,
    ),
    "olmo2": _fixed(),
    "starcoder2": _fixed(norm_epsilon=1e-5),
    "stablelm": _fixed(
        layer_norm_eps=1e-5, partial_rotary_factor=0.25, use_qkv_bias=False, use_parallel_residual=False
    ),
    "smollm3": _fixed(no_rope_layer_interval=4),
    "mamba": lambda _layers, width: {
        "state_size": 8,
        "intermediate_size": 2 * width,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 8,
    },
    "deepseek_v32": lambda layers, width: {
        **_EXTRAS["deepseek_v3"](layers, width),
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 8,
    },
    "hunyuan": _fixed(
        use_cla=True,
        cla_share_factor=2,
        attention_bias=False,
        use_qk_norm=True,
        num_experts=1,
        moe_topk=1,
        num_shared_expert=1,
        use_mixed_mlp_moe=False,
        rope_scaling={"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    ),
    "jamba": _fixed(
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=8,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
    ),
    "lfm2": lambda layers, _width: {
        "norm_eps": 1e-5,
        "full_attn_idxs": list(range(1, layers, 2)),
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "llama4": lambda layers, width: {
        "text_config": {
            "model_type": "llama4_text",
            "hidden_size": width,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": width // 4,
            "num_hidden_layers": layers,
            "vocab_size": 320,
            "intermediate_size": width,
            "intermediate_size_mlp": 2 * width,
            "max_position_embeddings": 4096,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "use_qk_norm": True,
            "attention_bias": False,
        }
    },
    "rwkv7": _head_dim(
        norm_eps=1e-5,
        num_heads=4,
        a_low_rank_dim=8,
        v_low_rank_dim=8,
        gate_low_rank_dim=8,
        decay_low_rank_dim=8,
    ),
    "talkie": _head_dim(),
}
FAMILIES = tuple(_EXTRAS)


def build_tiny(family: str, *, layers: int = 6, width: int = 64, vocab: int = 320, seed: int = 0) -> nn.Module:
    """A model of this family with random float32 weights, evaluated on the calling thread."""
    return _randomise(_build(tiny_config(family, layers=layers, width=width, vocab=vocab)), seed)


def write_tiny_model(
    path: Path,
    *,
    layers: int,
    width: int,
    vocab: int,
    family: str = "qwen2",
    quantize_bits: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """Write a random checkpoint that ``mlx_lm.load`` accepts; returns ``path``.

    The tokenizer is byte-level (a token per byte, three special tokens), so ``vocab`` must be at least 259.
    ``shards`` > 1 writes several weight files; an index names them in any case.
    """
    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab {vocab} is too small for the byte-level tokenizer: use at least {MIN_VOCAB}")
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, layers=layers, width=width, vocab=vocab)
    config["eos_token_id"] = [BYTE_VOCAB, BYTE_VOCAB + 2]
    model = _build(config)
    _randomise(model, seed)
    model.set_dtype(getattr(mx, dtype))
    if quantize_bits is not None:
        config["quantization"] = _quantize(model, quantize_bits, width)
    _write_weights(path, dict(tree_flatten(model.parameters())), shards)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(path)
    return path


def _build(config: dict[str, Any]) -> nn.Module:
    arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = arch.Model(arch.ModelArgs.from_dict(config))
    model.eval()
    return model


def _randomise(model: nn.Module, seed: int) -> nn.Module:
    """Normal weights scaled to their input width; one-dimensional parameters keep their defaults, slightly shaken."""

    def draw(name: str, value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating):
            return value
        key = mx.random.key(zlib.crc32(f"{seed}:{name}".encode()))
        noise = mx.random.normal(value.shape, key=key)
        if value.ndim < 2 or "conv" in name or "A_log" in name:
            return (mx.ones_like(value) if "norm" in name else mx.zeros_like(value)) + 0.05 * noise
        return noise * value.shape[-1] ** -0.5

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def _quantize(model: nn.Module, bits: int, width: int) -> dict[str, Any]:
    group_size = 64 if width % 64 == 0 else 32

    def fits(_name: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model, group_size=group_size, bits=bits, class_predicate=fits)
    return {"group_size": group_size, "bits": bits}


def _write_weights(path: Path, weights: dict[str, mx.array], shards: int) -> None:
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        mine = names[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mx.save_safetensors(str(path / file), {n: weights[n] for n in mine}, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(mine, file))
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
