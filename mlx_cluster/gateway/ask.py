"""What a client asks, once validated: the same frozen value for every dialect.

Owns: the border between the dialects (schemas in, rendering out) and the session, which knows no dialect.
Invariant: an ``Ask`` that exists is within its bounds, except for what only the model's tokenizer and context can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_cluster.config.schema import MAX_PRIORITY, MIN_PRIORITY
from mlx_cluster.gateway.idempotency import Key
from mlx_cluster.gateway.keys import NOBODY, Caller
from mlx_cluster.request import Grammar, Sampling

MAX_CHOICES = 16
MAX_SEQUENCES = 256  # of one request: prompts times choices
MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters; matching costs its square in the worst case
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 8192  # of a conversation, or items of one

AskedPriority = Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments.

    ``schema_field`` is the schema's place in the client's body where that is not OpenAI's. With a ``text_grammar`` the
    tool's whole input is plain text that follows it.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    schema_field: str = ""
    text_grammar: Grammar | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        parameters = {"type": "object", "properties": {}, **self.parameters}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request. ``choice`` "required" and ``only`` (the name of one) constrain the answer to calls."""

    tools: tuple[Tool, ...]
    choice: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """One client request, with ``messages`` or one or more ``prompts``, each a text or its token ids.

    ``sampling.seed`` is not resolved yet where ``seed_given`` is False. ``max_tokens`` None means what is left of the
    context, up to the session's bound. ``prompt_field``, ``max_tokens_field`` and ``grammar_field`` are the client's
    own names for them. ``template_values`` go to the chat template as they are.
    """

    model: str
    sampling: Sampling
    messages: tuple[Mapping[str, Any], ...] | None = None
    continues: bool = False  # the last of the messages is the answer's own beginning
    prompts: tuple[str | tuple[int, ...], ...] = ()
    suffix: str | None = None  # the answer belongs between the prompt and this
    echo: bool = False  # the answer begins with the prompt
    echo_only: bool = False  # and ends with it
    seed_given: bool = False
    max_tokens: int | None = None
    max_tokens_is_ceiling: bool = False  # more than the context leaves is no error, what is left is enough
    num_choices: int = 1  # that are answered for each prompt
    best_of: int | None = None  # so many are drawn for each prompt, of which the best are answered
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prompt_field: str = "messages"
    max_tokens_field: str = "max_tokens"
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    template_values: Mapping[str, Any] = field(default_factory=dict)
    hints: tuple[str, ...] = ()  # the fields that these come from, named when the template knows none of them
    tool_use: ToolUse | None = None
    grammar: Grammar | None = None
    grammar_field: str = "response_format"
    priority: int | None = None  # None: what the key's requests have
    speculate: bool | None = None  # None: as the engine sees fit
    caller: Caller = NOBODY
    key: Key | None = None  # a client that sends it again attaches to the same generation
    splits_reasoning: bool = False  # whether the dialect can show reasoning apart from text

    @property
    def num_drawn(self) -> int:
        """Sequences for each prompt."""
        return max(self.num_choices, self.best_of or 0)

    @property
    def num_sequences(self) -> int:
        """Sequences in all; those of one prompt follow each other."""
        return self.num_drawn * max(1, len(self.prompts))
