"""What a gateway asks an engine, and what it hears back: frozen values and one seam.

Owns: ``SequenceRequest`` (one generation of a request), its events, and the ``Engine`` protocol that the pipeline
engine, the remote engine and the tests' scripted engine implement.
Does not own: text. Inside the cluster there are only token ids.
Invariant: a stream is ``Admitted``, then ``Scored`` where asked for, then ``Token`` with index 0, 1, 2 …, then
``Finished``; or it raises a typed error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]
Pool = Literal["last", "mean"]
GrammarKind = Literal["json_schema", "regex", "lark", "choice", "llguidance"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from logits. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch off.

    The draw is keyed by ``(seed, choice, token index)``, so the same request resumes with the same randomness anywhere.
    ``top_logprobs`` is None when no log probabilities are asked for, else how many alternatives (0…20).
    ``repetition_penalty`` is the multiplicative one (1 = off); ``frequency_penalty`` and ``presence_penalty`` are
    OpenAI's and look at generated tokens only.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether the last stage must know prompt and emitted ids to sample."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a sequence may say. ``mlx_cluster.grammar`` checks it.

    ``source`` is a JSON schema, a regular expression, a Lark grammar in llguidance's dialect, for "choice" a JSON list
    of strings, one of which is said whole, or for "llguidance" several grammars in its own form.
    """

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One generation: ``n`` of them make a client's request.

    ``emitted`` are ids that an earlier attempt already delivered; the engine prefills them after the prompt and the
    first new token gets index ``len(emitted)``. ``stop_token_ids`` end the sequence (the id is delivered too).
    Under a ``grammar`` the last stage lets only its tokens pass, and a stop token exactly where it may end.
    ``tenant`` separates prefix caches, fairness and whatever else clients must not share; "" is all without a key.
    Higher ``priority`` is admitted earlier. A sequence that waits for a row longer than ``queue_seconds`` is given up.
    ``speculate`` overrides the engine's own judgement of drafts. ``key`` names a generation that a client may attach to
    again; such a one is held for a while when its stream breaks. ``repeatable`` says that asking again is meant to give
    the same tokens: it is greedy, or the client gave the seed.
    ``prompt_logprobs`` asks for the log probabilities of the prompt's own tokens, with so many alternatives (0…20).
    With ``pool`` nothing is generated: ``Finished.pooled`` is the state behind the final norm, at the prompt's last
    position or averaged over all, scaled to length 1. Either computes the whole prompt, whatever is cached.
    """

    request_id: str
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    choice: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    emitted: tuple[int, ...] = ()
    priority: int = 0
    grammar: Grammar | None = None
    tenant: str = ""
    queue_seconds: float | None = None
    speculate: bool | None = None
    key: str = ""
    prompt_logprobs: int | None = None
    pool: Pool | None = None
    repeatable: bool = False

    @property
    def reads_prompt(self) -> bool:
        """Whether something is read off every position of the prompt, so that none may come from a cache."""
        return self.prompt_logprobs is not None or self.pool is not None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The engine has taken the sequence; a gateway may send its status now. ``Finished`` has the final count."""

    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One new token. ``logprob`` and ``top`` (id, log probability), best first, only when asked for."""

    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of the prompt with their log probabilities; ``index`` is the place in the prompt, which begins with 1.

    Only when asked for: in order, each once, before the first ``Token``. The first token of a prompt has none.
    """

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    pooled: tuple[float, ...] = ()


Event = Admitted | Scored | Token | Finished


class Engine(Protocol):
    """Serves one pipeline. Closing the generator (``aclose``) cancels the sequence on every stage."""

    def generate(self, request: SequenceRequest) -> AsyncGenerator[Event]:
        """Events of one sequence. Raises ``Overloaded``, ``Unavailable``, ``StageLost``, ``ContextLengthExceeded``."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a gateway must know of a model to serve it. ``model_dir`` is this node's own path.

    ``fallback`` is the model that may answer while this one cannot be served. ``embeddings`` says how a text becomes a
    vector, for a model that was made for it.
    """

    id: str
    aliases: tuple[str, ...]
    model_dir: str
    max_context: int
    created: int
    state: Literal["loading", "ready", "failed"]
    detail: str = ""
    fallback: str | None = None
    embeddings: Pool | None = None


class Routes(Protocol):
    """The routing table that a gateway reads: model name to engine."""

    def models(self) -> list[ServedModel]:
        """Every configured model, ready or not."""
        ...

    def engine_for(self, model_id: str) -> Engine:
        """An engine that serves this model id now. Raises ``Unavailable`` with the reason when none does."""
        ...
