"""The field table: what happens to every field of every dialect.

Owns: which fields are honoured, advisory, dropped and named in a header, or refused by name, and why.
Does not own: types and bounds of honoured fields (``schemas``).
Invariant: a field that is accepted either has its effect or, by its own contract, none on the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_cluster.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Rule:
    """``neutral`` are the values of a refused field that ask for nothing beyond what happens anyway."""

    kind: Literal["honoured", "advisory", "dropped", "refused"]
    why: str = ""
    neutral: tuple[Any, ...] = ()


HONOURED = Rule("honoured")
ADVISORY = Rule("advisory")


def _refused(why: str, *neutral: Any) -> Rule:
    return Rule("refused", why, neutral)


def _dropped(why: str, *neutral: Any) -> Rule:
    return Rule("dropped", why, neutral)


_TEXT_ONLY = "this server produces and reads text only"
_HOSTED = "this server runs no tools of its own"

_SAMPLING: Mapping[str, Rule] = dict.fromkeys(
    (
        "model",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "n",
        "logprobs",
        "ignore_eos",
        "logit_bias",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "priority",
        "speculation",
    ),
    HONOURED,
)

_NO_EFFECT_ON_OUTPUT: Mapping[str, Rule] = dict.fromkeys(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",  # may make an answer faster, never another one
    ),
    ADVISORY,
)

CHAT: Mapping[str, Rule] = {
    **_SAMPLING,
    **_NO_EFFECT_ON_OUTPUT,
    "messages": HONOURED,
    "max_completion_tokens": HONOURED,
    "top_logprobs": HONOURED,
    **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "response_format"), HONOURED),
    **dict.fromkeys(("reasoning_effort", "chat_template_kwargs"), HONOURED),
    "functions": _refused("this name is retired; use tools", []),
    "function_call": _refused("this name is retired; use tool_choice", "none", "auto"),
    "modalities": _refused(_TEXT_ONLY, ["text"], []),
    "audio": _refused(_TEXT_ONLY),
    "verbosity": _refused("verbosity cannot be set; say in the prompt how long the answer should be", "medium"),
    "web_search_options": _refused("this server does not search the web; leave the field out"),
    "moderation": _refused("this server does not moderate; leave the field out"),
}

COMPLETION: Mapping[str, Rule] = {
    **_SAMPLING,
    **dict.fromkeys(("user", "metadata", "store", "service_tier"), ADVISORY),
    "prompt": HONOURED,
    **dict.fromkeys(("best_of", "echo", "suffix"), HONOURED),
}


MESSAGES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "model",
            "messages",
            "system",
            "max_tokens",
            "stop_sequences",
            "stream",
            "temperature",
            "top_p",
            "top_k",
            "priority",
            "speculation",
        ),
        HONOURED,
    ),
    **dict.fromkeys(
        (
            "metadata",
            "cache_control",
            "context_management",
            "service_tier",
            "inference_geo",
            "speed",
            "diagnostics",
            "billing_policy",
            "fallback_credit_token",
            "anthropic_version",
        ),
        ADVISORY,
    ),
    **dict.fromkeys(("thinking", "output_config", "tools", "tool_choice"), HONOURED),
    "mcp_servers": _dropped(_HOSTED, []),
    "container": _dropped(_HOSTED),
    "compaction": _dropped("a conversation is not compacted here"),
    "fallbacks": _dropped("another model is not asked instead", []),
    "output_format": _refused("this name is retired; use output_config.format"),
    "thread": _refused("this server keeps no threads; send the whole conversation in messages"),
}


RESPONSES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "model",
            "input",
            "instructions",
            "max_output_tokens",
            "temperature",
            "top_p",
            "stream",
            "stream_options",
            "store",
            "background",
            "previous_response_id",
            "include",
            "top_logprobs",
            "text",
            "metadata",
            "parallel_tool_calls",
            "priority",
            "speculation",
        ),
        HONOURED,
    ),
    **dict.fromkeys(
        (
            "user",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "client_metadata",
            "max_tool_calls",  # counts calls of hosted tools, and there are none
        ),
        ADVISORY,
    ),
    **dict.fromkeys(("reasoning", "tools", "tool_choice"), HONOURED),
    "context_management": _dropped("a conversation is not compacted here", []),
    "access_programs": _dropped("there are no such programs here"),
    "image": _dropped(_TEXT_ONLY),
    "truncation": _refused("a prompt is not cut to fit; shorten the input", "disabled"),
    "conversation": _refused("conversations are not kept; use previous_response_id"),
    "prompt": _refused("prompt templates are not kept; send the input itself"),
    "moderation": _refused("this server does not moderate; leave the field out"),
}


# With messages /tokenize takes those fields of a chat that shape its prompt.
TOKENIZE: Mapping[str, Rule] = {
    **dict.fromkeys(("model", "prompt", "add_special_tokens", "return_token_strs"), HONOURED),
    **dict.fromkeys(("messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs"), HONOURED),
    "add_generation_prompt": _refused("a conversation always ends where the answer begins", True),
}

DETOKENIZE: Mapping[str, Rule] = dict.fromkeys(("model", "tokens"), HONOURED)


EMBEDDINGS: Mapping[str, Rule] = {
    **dict.fromkeys(("model", "input", "encoding_format", "dimensions"), HONOURED),
    "user": ADVISORY,
}


_OLLAMA: Mapping[str, Rule] = {
    **dict.fromkeys(("model", "stream", "format", "options", "think", "logprobs", "top_logprobs"), HONOURED),
    "keep_alive": ADVISORY,  # what is served stays loaded
    "truncate": _dropped("a prompt is not cut to fit; one that does not fit is refused", False),
    "shift": _dropped("a context that is full ends the answer", False),
}

OLLAMA_CHAT: Mapping[str, Rule] = {
    **_OLLAMA,
    **dict.fromkeys(("messages", "tools"), HONOURED),
}

OLLAMA_GENERATE: Mapping[str, Rule] = {
    **_OLLAMA,
    **dict.fromkeys(("prompt", "suffix", "system", "raw"), HONOURED),
    "images": _refused(_TEXT_ONLY, []),
    "template": _refused("the model's own template is used; with raw: true the prompt is taken as it is", ""),
    "context": _refused("token ids of earlier answers are not taken back; use /api/chat with its messages", []),
    **dict.fromkeys(("width", "height", "steps"), _refused(_TEXT_ONLY)),
}

OLLAMA_OPTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "num_predict",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "seed",
            "stop",
            "repeat_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
        HONOURED,
    ),
    **dict.fromkeys(
        (
            "num_ctx",
            "num_keep",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "numa",
            "low_vram",
            "f16_kv",
            "use_mmap",
            "use_mlock",
            "vocab_only",
            "logits_all",
            "embedding_only",
        ),
        ADVISORY,
    ),
    "repeat_last_n": _dropped("the repeat penalty looks at the whole conversation", -1),
    "tfs_z": _dropped("there is no such filter", 1, 1.0),
    "typical_p": _dropped("there is no such filter", 1, 1.0),
    "mirostat": _dropped("there is no such sampler", 0),
    "mirostat_tau": _dropped("there is no such sampler"),
    "mirostat_eta": _dropped("there is no such sampler"),
    "penalize_newline": _dropped("a line's end is penalised as any other token", True),
}

OLLAMA_EMBED: Mapping[str, Rule] = {
    **dict.fromkeys(("model", "input", "truncate", "dimensions"), HONOURED),
    **dict.fromkeys(("options", "keep_alive"), ADVISORY),
}

OLLAMA_EMBEDDINGS: Mapping[str, Rule] = {
    **dict.fromkeys(("model", "prompt"), HONOURED),
    **dict.fromkeys(("options", "keep_alive"), ADVISORY),
}

OLLAMA_SHOW: Mapping[str, Rule] = {"model": HONOURED, "verbose": ADVISORY}


def honoured(values: Mapping[str, Any], table: Mapping[str, Rule], dropped: list[str] | None = None) -> dict[str, Any]:
    """The honoured fields that are present (null means absent); raises ``InvalidRequest`` for any other with effect.

    The names of fields that are dropped go to ``dropped``, which a dialect with such fields must give.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        rule = table.get(name)
        if rule is None:
            raise InvalidRequest(
                f"unknown field {name[:64]!r}: this server does not know it, so it would have no effect; leave it out",
                param=name[:64],
                code="unknown_parameter",
            )
        if value is None or rule.kind == "advisory":
            continue
        if rule.kind == "honoured":
            kept[name] = value
        elif any(value == neutral and type(value) is type(neutral) for neutral in rule.neutral):
            continue
        elif rule.kind == "dropped" and dropped is not None:
            dropped.append(name)
        else:
            raise InvalidRequest(f"{name}: {rule.why}", param=name, code="unsupported_parameter")
    return kept
