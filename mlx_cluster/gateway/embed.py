"""Texts to vectors: one pooled sequence for each text, some at a time.

Owns: the bounds of such a request, its sequences, its deadline.
Does not own: the dialects that ask for vectors (``embeddings_routes``, ``ollama_routes``), the vectors (the engine).
Invariant: every text has one vector, in order, or the request fails as a whole and its sequences are cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_cluster.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, Unavailable
from mlx_cluster.gateway.answer import Gateway
from mlx_cluster.gateway.keys import Caller
from mlx_cluster.request import Finished, Sampling, SequenceRequest, ServedModel
from mlx_cluster.tokenizer import Tokenizer

MAX_INPUTS = 2048
# Sequences of one request that an engine has at a time; the others wait here and not in its queue.
AT_A_TIME = 16

Input = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wish:
    """``truncates``: a text that is longer than the context is cut instead of refused."""

    model: str
    inputs: tuple[Input, ...]
    dimensions: int | None = None
    truncates: bool = False
    model_field: str = "model"
    input_field: str = "input"


@dataclass(frozen=True, slots=True)
class Vectors:
    model: str
    vectors: list[tuple[float, ...]]
    prompt_tokens: int


async def embed(wish: Wish, gateway: Gateway, caller: Caller, request_id: str) -> Vectors:
    """Raises ``InvalidRequest`` (a model that gives no vectors too), ``Unavailable``, ``DeadlineExceeded``."""
    model = gateway.catalogue.find(wish.model)
    if model.embeddings is None:
        raise InvalidRequest(
            f"the model {model.id!r} gives no embeddings: it was made to generate text, and the state inside of one is "
            f"no measure of likeness; ask an embedding model (is it one? models.{model.id}.embeddings: last)",
            param=wish.model_field,
            code="unsupported_model",
        )
    seconds = gateway.settings.total_timeout
    try:
        async with asyncio.timeout(seconds):
            return await _embed(wish, model, gateway, caller, request_id)
    except TimeoutError:
        raise DeadlineExceeded(
            f"not all vectors were there within {seconds:g} s (api_gateway.total_timeout): send fewer texts"
        ) from None


async def _embed(wish: Wish, model: ServedModel, gateway: Gateway, caller: Caller, request_id: str) -> Vectors:
    engine = gateway.catalogue.engine_for(model)
    tokenizer = await gateway.catalogue.tokenizer(model)
    prompts = await gateway.catalogue.off_loop(_encode, wish, model, tokenizer)
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(index: int, prompt: tuple[int, ...]) -> tuple[float, ...]:
        request = SequenceRequest(
            request_id=request_id,
            model=model.id,
            prompt=prompt,
            max_tokens=0,
            sampling=Sampling(temperature=0.0),
            choice=index,
            tenant=caller.tenant,
            priority=caller.priority(None),
            queue_seconds=caller.queue_seconds,
            pool=model.embeddings,
        )
        async with places, contextlib.aclosing(engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, Finished) and event.pooled:
                    return event.pooled
        raise Unavailable("the engine ended this text without a vector: send the request again")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others are cancelled, and only followed from it
    vectors = [_shortened(task.result(), wish.dimensions) for task in tasks]
    num_tokens = sum(map(len, prompts))
    gateway.metrics.prompt_tokens.labels(model.id).inc(num_tokens)
    return Vectors(model.id, vectors, num_tokens)


def _encode(wish: Wish, model: ServedModel, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for index, given in enumerate(wish.inputs):
        field = f"{wish.input_field}[{index}]" if len(wish.inputs) > 1 else wish.input_field
        ids = tokenizer.encode(given) if isinstance(given, str) else given
        if not ids:
            raise InvalidRequest(f"{field} gives no token: send some text", param=field, code="invalid_value")
        if max(ids) >= tokenizer.vocab_size:
            raise InvalidRequest(
                f"{field} has the token id {max(ids)}, but the model's vocabulary ends at {tokenizer.vocab_size - 1}",
                param=field,
                code="invalid_value",
            )
        if len(ids) > model.max_context:
            if not wish.truncates:
                raise ContextLengthExceeded(
                    f"{field} has {len(ids)} tokens, the context of {model.id!r} is {model.max_context}: shorten it",
                    param=field,
                )
            ids = ids[: model.max_context]
        found.append(ids)
    return found


def _shortened(vector: Sequence[float], dimensions: int | None) -> tuple[float, ...]:
    """The first so many dimensions, scaled to length 1 again. Raises ``InvalidRequest`` when there are not so many."""
    if dimensions is None or dimensions == len(vector):
        return tuple(vector)
    if dimensions > len(vector):
        raise InvalidRequest(
            f"dimensions is {dimensions}, the vectors of this model have {len(vector)}: ask for fewer",
            param="dimensions",
            code="invalid_value",
        )
    kept = vector[:dimensions]
    length = math.sqrt(sum(value * value for value in kept)) or 1.0
    return tuple(value / length for value in kept)
