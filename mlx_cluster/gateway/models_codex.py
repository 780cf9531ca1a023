"""A served model in the form that Codex asks for: its list of models, which it asks with its own version.

Owns: who asks in this form, and the fields that Codex insists on.
Does not own: the models (``catalogue``), the route (``models_routes``).
Invariant: what is claimed of a model is what this gateway serves: text, parallel calls, grammars of custom tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_cluster.request import ServedModel

VERSION_QUERY = "client_version"
MAX_TOOL_OUTPUT_BYTES = 10_000

# Codex sends a model the instructions that stand in this list, and has none of its own for a name it does not know.
_INSTRUCTIONS = (
    "You are a coding agent. You work in a terminal on the user's machine, in the directory that you were started in. "
    "Find out before you change anything: read the files that matter, and the instructions that the project keeps for "
    "agents. Make the smallest change that solves the whole task, in the style of the code around it. Edit files with "
    "the apply_patch tool where you have it, else with the shell. Run the tests that cover what you changed, and say "
    "what you could not run. Never undo changes that are not yours, and ask before you delete data. Keep answers "
    "short: say what you did, where, and what remains."
)


def asked(query: Mapping[str, str]) -> bool:
    """Whether who asks is Codex."""
    return VERSION_QUERY in query


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    return {"models": [_entry(model, priority) for priority, model in enumerate(models)]}


def _entry(model: ServedModel, priority: int) -> dict[str, Any]:
    return {
        "slug": model.id,
        "display_name": model.id,
        "description": f"{model.state}{f': {model.detail}' if model.detail else ''}",
        "supported_reasoning_levels": [],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": priority,
        "upgrade": None,
        "base_instructions": _INSTRUCTIONS,
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": "freeform",
        "truncation_policy": {"mode": "bytes", "limit": MAX_TOOL_OUTPUT_BYTES},
        "supports_parallel_tool_calls": True,
        "context_window": model.max_context,
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
        "aliases": list(model.aliases),
        "state": model.state,
    }
