"""From what a client asks to the sequences an engine is given.

Owns: prompt ids, the context check, the default length, the seed, everything that needs the model's tokenizer.
Does not own: running the sequences (``session``).
Invariant: what leaves here fits the model's context and names only ids of its vocabulary.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_cluster import grammar
from mlx_cluster.errors import ContextLengthExceeded, InvalidRequest, Recovering
from mlx_cluster.gateway import structured
from mlx_cluster.gateway.ask import Ask, Tool
from mlx_cluster.gateway.catalogue import Catalogue
from mlx_cluster.gateway.splitter import PLAIN, Shape
from mlx_cluster.request import Engine, Grammar, SequenceRequest, ServedModel
from mlx_cluster.tokenizer import Tokenizer
from mlx_cluster.tokenizer.tools import JSON_FORMAT, JSON_OR_TEXT_FORMAT, teach, with_short_ids

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
    engine_for: Callable[[], Engine]  # asked anew for every attempt; raises ``Unavailable``
    sequences: tuple[SequenceRequest, ...]
    shape: Shape = PLAIN

    @property
    def prompt_tokens(self) -> int:
        return sum(len(sequence.prompt) for sequence in self.sequences[:: self.ask.num_drawn])


def random_seed() -> int:
    return secrets.randbits(63)


async def prepare(
    ask: Ask, request_id: str, catalogue: Catalogue, draw_seed: Callable[[], int] = random_seed
) -> Prepared:
    """Resolve the model, tokenize, check. Raises ``InvalidRequest`` and its kinds, or ``Unavailable``."""
    priority = ask.caller.priority(ask.priority)
    model = catalogue.serving(ask.model)
    engine_for = partial(catalogue.engine_for, model)
    with suppress(Recovering):  # the session waits for it
        engine_for()  # first: a model that is not ready needs no tokenizing
    tokenizer = await catalogue.tokenizer(model)
    prompts, opened = await _prompt_ids(ask, tokenizer, catalogue)
    shape = _shape(ask, tokenizer, opened)
    bound = await _grammar(ask, tokenizer, shape, catalogue)
    for token_id, _ in ask.sampling.logit_bias:
        _check_id(token_id, tokenizer, "logit_bias")
    seed = ask.sampling.seed if ask.seed_given else draw_seed() if ask.key is None else ask.key.seed()
    sampling = replace(ask.sampling, seed=seed)
    logprobs = sampling.top_logprobs
    if ask.num_drawn > ask.num_choices and logprobs is None:
        sampling = replace(sampling, top_logprobs=0)  # the best are chosen by them
    shared = SequenceRequest(
        request_id=request_id,
        model=model.id,
        prompt=(),
        max_tokens=0,
        sampling=sampling,
        stop_token_ids=frozenset() if ask.ignore_eos else tokenizer.eos_token_ids,
        grammar=bound,
        prompt_logprobs=logprobs if ask.echo else None,
        tenant=ask.caller.tenant,
        priority=priority,
        queue_seconds=ask.caller.queue_seconds,
        speculate=ask.speculate,
        key="" if ask.key is None else str(ask.key),
        repeatable=ask.seed_given or ask.sampling.temperature == 0,
    )
    each = [replace(shared, prompt=ids, max_tokens=_max_tokens(ask, model, len(ids))) for ids in prompts]
    sequences = tuple(
        replace(sequence, choice=at * ask.num_drawn + choice)
        for at, sequence in enumerate(each)
        for choice in range(ask.num_drawn)
    )
    return Prepared(ask=ask, model=model, tokenizer=tokenizer, engine_for=engine_for, sequences=sequences, shape=shape)


async def count_prompt(ask: Ask, catalogue: Catalogue) -> int:
    """How many tokens the prompt has. Raises as ``prompt_ids`` does."""
    return len(await prompt_ids(ask, catalogue))


async def prompt_ids(ask: Ask, catalogue: Catalogue) -> tuple[int, ...]:
    """The ids that the model would be given. Raises as ``prepare`` does, but needs no engine."""
    tokenizer = await catalogue.tokenizer(catalogue.find(ask.model))
    prompts, _ = await _prompt_ids(ask, tokenizer, catalogue)
    return prompts[0]


async def _prompt_ids(ask: Ask, tokenizer: Tokenizer, catalogue: Catalogue) -> tuple[list[tuple[int, ...]], bool]:
    """The ids of each prompt, and whether a conversation ends inside the model's reasoning."""
    if ask.messages is not None:
        ids, opened = await catalogue.off_loop(_render, ask, ask.messages, tokenizer)
        found = [ids]
    else:
        opened = False
        length = sum(len(prompt) for prompt in ask.prompts if isinstance(prompt, str))
        if length > SHORT_TEXT_CHARACTERS:
            found = await catalogue.off_loop(_encode_prompts, ask, tokenizer)
        else:
            found = _encode_prompts(ask, tokenizer)
            await asyncio.sleep(0)
    if not all(found):
        raise InvalidRequest(
            f"{ask.prompt_field} gives no token at all: send some text", param=ask.prompt_field, code="invalid_value"
        )
    return found, opened


def _encode_prompts(ask: Ask, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for prompt in ask.prompts:
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, add_special_tokens=ask.suffix is None)
        else:
            _check_id(max(prompt), tokenizer, ask.prompt_field)
            ids = prompt
        found.append(ids if ask.suffix is None else tokenizer.fill_in(ids, ask.suffix))
    return found


def _render(ask: Ask, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[tuple[int, ...], bool]:
    """Render a conversation. A template that knows no tools gets them as an instruction, and calls as text."""
    values = dict(ask.template_values)
    bound = binds_text(ask, tokenizer)
    tools = [_told(tool, bound).for_template() for tool in offered(ask)]
    if tokenizer.harmony:
        messages = [_for_harmony(message) for message in messages]
        if tools:
            values["tools"] = tools
    elif tokenizer.tool_format is None:
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            messages = teach(messages, tools)
    elif tools:
        values["tools"] = tools
    if tokenizer.tool_format is not None and tokenizer.tool_format.name == "mistral":
        messages = with_short_ids(messages)
    text = tokenizer.chat_text(messages, continues=ask.continues, **values)
    opened = tokenizer.reasoning is not None and tokenizer.reasoning.opened_by(text)
    return tokenizer.encode(text, add_special_tokens=False), opened


def _for_harmony(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reasoning goes back to the model only beside calls, and not beside text: its template insists."""
    if "reasoning_content" not in message:
        return message
    values = dict(message)
    reasoning = values.pop("reasoning_content")
    return {**values, "thinking": reasoning} if values.get("tool_calls") and not values.get("content") else values


def _told(tool: Tool, bound: bool) -> Tool:
    """A tool as its model hears of it: how to call one that takes plain text, where that is not in arguments."""
    if tool.text_grammar is None or not bound:
        return tool
    form = f'{JSON_FORMAT.start}\n{{"name": "{tool.name}"}}\nthe input\n{JSON_FORMAT.end}'
    return replace(
        tool,
        description=f"{tool.description}\n\nCall it without arguments, with its input as it is:\n{form}",
        parameters={},
    )


def offered(ask: Ask) -> tuple[Tool, ...]:
    """The tools that the model is told of."""
    use = ask.tool_use
    return use.tools if use is not None and use.choice != "none" else ()


def binds_text(ask: Ask, tokenizer: Tokenizer) -> bool:
    """Whether calls of tools with plain text are bound to their grammars: where calls are written in the JSON form."""
    if tokenizer.harmony or not any(tool.text_grammar is not None for tool in offered(ask)):
        return False
    use = ask.tool_use
    constrained = ask.grammar is not None or (use is not None and use.choice == "required")
    return tokenizer.has_grammars and (constrained or tokenizer.tool_format in (None, JSON_FORMAT))


def _shape(ask: Ask, tokenizer: Tokenizer, opened: bool) -> Shape:
    """What to look for in the answer. Calls that a grammar writes are in the JSON form, whatever the family."""
    use = ask.tool_use
    tools = offered(ask)
    reasoning = tokenizer.reasoning if ask.splits_reasoning else None
    shape = Shape(reasoning=reasoning, begins_in_reasoning=opened and reasoning is not None)
    if tokenizer.harmony and ask.splits_reasoning:
        return Shape(harmony=True, parallel=use is None or use.parallel)
    if use is None or not tools:
        return shape
    constrained = use.choice == "required" or ask.grammar is not None
    form = JSON_FORMAT if constrained else tokenizer.tool_format or JSON_FORMAT
    return replace(
        shape,
        format=JSON_OR_TEXT_FORMAT if binds_text(ask, tokenizer) else form,
        tools=[tool.for_template() for tool in tools],
        parallel=use.parallel,
    )


async def _grammar(ask: Ask, tokenizer: Tokenizer, shape: Shape, catalogue: Catalogue) -> Grammar | None:
    """The grammar of the whole answer, if it is bound to one. Raises ``InvalidRequest``."""
    use = ask.tool_use if offered(ask) else None
    required = use is not None and use.choice == "required"
    may_call = use is not None and not required and ask.grammar is None and binds_text(ask, tokenizer)
    if ask.grammar is None and not required and not may_call:
        return None
    field = "tool_choice" if required else "tools" if may_call else ask.grammar_field
    if not tokenizer.has_grammars or not tokenizer.eos_token_ids:
        raise InvalidRequest(
            f"{field} cannot be served: this model has no tokenizer.json, or no token that ends an answer",
            param=field,
            code="unsupported_parameter",
        )
    if ask.ignore_eos:
        raise InvalidRequest(f"ignore_eos and {field} contradict each other: leave one out", param="ignore_eos")

    def compose() -> Grammar | None:
        if use is not None:
            tools = [tool for tool in use.tools if tool.text_grammar is not None or not may_call]
            structured.check_tools(
                tools, lambda index: tools[index].schema_field or f"tools[{index}].function.parameters"
            )
        if ask.grammar is not None:
            grammar.check(ask.grammar, ask.grammar_field)
        main = None if required else ask.grammar
        opened = shape.begins_in_reasoning
        whole = (
            structured.compose_harmony(main, use, tokenizer.special_id)
            if shape.harmony
            else structured.compose(
                main, use, shape.reasoning, opened=opened, special_id=tokenizer.special_id, may_call=may_call
            )
        )
        if whole is not None and whole is not ask.grammar:
            grammar.check(whole, field)
        return whole

    return await catalogue.off_loop(compose)


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
