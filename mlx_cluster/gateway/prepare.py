"""From what a client asks to the sequences an engine is given.

Owns: prompt ids, the context check, the default length, the seed, everything that needs the model's tokenizer.
Does not own: running the sequences (``session``).
Invariant: what leaves here fits the model's context and names only ids of its vocabulary.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from mlx_cluster.errors import ContextLengthExceeded, InvalidRequest
from mlx_cluster.gateway.ask import Ask
from mlx_cluster.gateway.catalogue import Catalogue
from mlx_cluster.request import Engine, SequenceRequest, ServedModel
from mlx_cluster.tokenizer import Tokenizer

# Without max_tokens an answer may take what is left of the context, but an engine promises memory for all of it:
# beyond this a client must say that it wants more.
DEFAULT_MAX_TOKENS = 4096
# Shorter texts are tokenized where they are: handing them to a thread takes longer.
SHORT_TEXT_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a session needs."""

    ask: Ask
    model: ServedModel
    tokenizer: Tokenizer
    engine: Engine
    sequences: tuple[SequenceRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        return len(self.sequences[0].prompt)


def random_seed() -> int:
    return secrets.randbits(63)


async def prepare(
    ask: Ask, request_id: str, catalogue: Catalogue, draw_seed: Callable[[], int] = random_seed
) -> Prepared:
    """Resolve the model, tokenize, check. Raises ``InvalidRequest`` and its kinds, or ``Unavailable``."""
    model = catalogue.find(ask.model)
    engine = catalogue.engine_for(model)  # first: a model that is not ready needs no tokenizing
    tokenizer = await catalogue.tokenizer(model)
    prompt = await _prompt_ids(ask, tokenizer, catalogue)
    for token_id, _ in ask.sampling.logit_bias:
        _check_id(token_id, tokenizer, "logit_bias")
    sampling = ask.sampling if ask.seed_given else replace(ask.sampling, seed=draw_seed())
    shared = SequenceRequest(
        request_id=request_id,
        model=model.id,
        prompt=prompt,
        max_tokens=_max_tokens(ask, model, len(prompt)),
        sampling=sampling,
        stop_token_ids=frozenset() if ask.ignore_eos else tokenizer.eos_token_ids,
    )
    sequences = tuple(replace(shared, choice=choice) for choice in range(ask.num_choices))
    return Prepared(ask=ask, model=model, tokenizer=tokenizer, engine=engine, sequences=sequences)


async def count_prompt(ask: Ask, catalogue: Catalogue) -> int:
    """How many tokens the prompt has. Raises as ``prepare`` does, but needs no engine."""
    tokenizer = await catalogue.tokenizer(catalogue.find(ask.model))
    return len(await _prompt_ids(ask, tokenizer, catalogue))


async def _prompt_ids(ask: Ask, tokenizer: Tokenizer, catalogue: Catalogue) -> tuple[int, ...]:
    if ask.token_ids is not None:
        _check_id(max(ask.token_ids), tokenizer, ask.prompt_field)
        return ask.token_ids
    if ask.messages is not None:
        messages = ask.messages
        ids = await catalogue.off_loop(lambda: tokenizer.render_chat(messages, **ask.template_values))
    elif ask.text is not None and len(ask.text) > SHORT_TEXT_CHARACTERS:
        ids = await catalogue.off_loop(tokenizer.encode, ask.text)
    else:
        ids = tokenizer.encode(ask.text or "")
        await asyncio.sleep(0)
    if not ids:
        raise InvalidRequest(
            f"{ask.prompt_field} gives no token at all: send some text", param=ask.prompt_field, code="invalid_value"
        )
    return ids


def _check_id(token_id: int, tokenizer: Tokenizer, param: str) -> None:
    if token_id >= tokenizer.vocab_size:
        raise InvalidRequest(
            f"{param} has the token id {token_id}, but the model's vocabulary ends at {tokenizer.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )


def _max_tokens(ask: Ask, model: ServedModel, prompt_tokens: int) -> int:
    left = model.max_context - prompt_tokens
    if left < 1:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens, and the context of {model.id!r} is {model.max_context} with room "
            f"for an answer: shorten the prompt by {1 - left} tokens or more",
            param=ask.prompt_field,
        )
    if ask.max_tokens is None:
        return min(left, DEFAULT_MAX_TOKENS)
    if ask.max_tokens > left and ask.max_tokens_is_ceiling:
        return left
    if ask.max_tokens > left:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens and {ask.max_tokens_field} asks for {ask.max_tokens} more, "
            f"together {prompt_tokens + ask.max_tokens}, but the context of {model.id!r} is {model.max_context}: "
            f"shorten the prompt, or set {ask.max_tokens_field} to {left} or less",
            param=ask.max_tokens_field if prompt_tokens < ask.max_tokens else ask.prompt_field,
        )
    return ask.max_tokens
