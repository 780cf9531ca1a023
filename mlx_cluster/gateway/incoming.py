"""A request on its way in, for the dialects that drop fields: read, parsed, and its answer's headers.

Owns: where a body is parsed, the header ``x-mlx-cluster-ignored``.
Does not own: limits of reading (``client``), what a body means.
Invariant: whatever a client asked for in vain stands in that header, also when its request fails later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from starlette.requests import Request

from mlx_cluster.gateway.answer import Gateway
from mlx_cluster.gateway.ask import Ask
from mlx_cluster.gateway.client import read_json_body
from mlx_cluster.gateway.idempotency import key_of
from mlx_cluster.gateway.middleware import ANSWER_HEADERS
from mlx_cluster.gateway.prepare import binds_text, offered

T = TypeVar("T")

IGNORED_HEADER = b"x-mlx-cluster-ignored"
MAX_NAMES_IN_HEADER = 32
# A longer body is parsed in a thread: a megabyte of messages takes longer than other clients' tokens should wait.
PARSE_ON_LOOP_BYTES = 64 * 1024
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._\[\]-]")
MAX_NAME_LENGTH = 96


async def read_parsed(request: Request, gateway: Gateway, parse: Callable[[bytes], T]) -> T:
    """The body of a JSON request as ``parse`` gives it. Raises what ``read_json_body`` and ``parse`` raise."""
    settings = gateway.settings
    raw = await read_json_body(request, max_bytes=settings.max_body_bytes, timeout_seconds=settings.timeout)
    return parse(raw) if len(raw) <= PARSE_ON_LOOP_BYTES else await gateway.catalogue.off_loop(parse, raw)


def asked_by(request: Request, ask: Ask, gateway: Gateway) -> Ask:
    """The ask of whoever presents this request's API key, under its ``Idempotency-Key`` if it has one.

    Raises ``InvalidRequest``, and ``IdempotencyKeyReused`` where that one stands for another body.
    """
    caller = gateway.keys.caller(request.scope["headers"])
    key = key_of(request, caller.tenant)
    if key is not None:
        gateway.key_book.check(key)
    return replace(ask, caller=caller, key=key)


async def has_effect(ask: Ask, gateway: Gateway) -> bool:
    """Whether the chat template of the model knows any of the ask's ``template_values``. Raises ``ModelNotFound``."""
    if not ask.template_values:
        return True
    tokenizer = await gateway.catalogue.tokenizer(gateway.catalogue.find(ask.model))
    return bool(ask.template_values.keys() & tokenizer.template_names)


async def hints_in_vain(ask: Ask, gateway: Gateway) -> tuple[str, ...]:
    """The fields that ask something of a chat template which does not know it."""
    return () if not ask.hints or await has_effect(ask, gateway) else ask.hints


async def formats_in_vain(ask: Ask, gateway: Gateway) -> list[str]:
    """The grammars of tools that this model's own form of calls leaves unbound."""
    bound = [tool.name for tool in offered(ask) if tool.text_grammar is not None]
    if not bound:
        return []
    tokenizer = await gateway.catalogue.tokenizer(gateway.catalogue.find(ask.model))
    return [] if binds_text(ask, tokenizer) else [f"tools[{name}].format" for name in bound]


def add_answer_header(request: Request, name: bytes, value: bytes) -> None:
    """Whatever the answer will be, an error too, it has this header."""
    headers = getattr(request.state, ANSWER_HEADERS, ())
    setattr(request.state, ANSWER_HEADERS, (*headers, (name, value)))


def name_dropped(request: Request, names: Iterable[str]) -> None:
    """Name what was dropped in the answer's header, without what does not belong into one."""
    shown = list(dict.fromkeys(_NOT_IN_A_NAME.sub("_", name[:MAX_NAME_LENGTH]) for name in names))
    if len(shown) > MAX_NAMES_IN_HEADER:
        shown[MAX_NAMES_IN_HEADER:] = [f"and_{len(shown) - MAX_NAMES_IN_HEADER}_more"]
    if shown:
        add_answer_header(request, IGNORED_HEADER, ", ".join(shown).encode())
