"""``Idempotency-Key``: a client's name for a request that it may send again, and what derives from it.

Owns: the header's form, the key's hashes, the seed and the ids that follow from them, which body a key stands for.
Does not own: the generations that are held (``engine.held``).
Invariant: the same header, API key, route and body give the same seed and ids at every gateway; with another body it is
refused, by whichever gateway or engine remembers the first.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from starlette.requests import Request

from mlx_cluster.errors import IdempotencyKeyReused, InvalidRequest

HEADER = "Idempotency-Key"
MAX_LENGTH = 255
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,255}")
_BODY = "idempotency_body"  # in the request's state: the hash of its route and body
# Keys that a gateway remembers with their bodies; the least recently used ones go.
MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Key:
    """``name`` is the hash of tenant and header, ``body`` that of route and body."""

    name: str
    body: str

    def __str__(self) -> str:
        """As engines know it (``SequenceRequest.key``)."""
        return f"{self.name}:{self.body}"

    def derive(self, purpose: str, num_bytes: int) -> str:
        """At most 32 bytes as hexadecimal digits, for this purpose alone."""
        return hashlib.sha256(f"{self}/{purpose}".encode()).hexdigest()[: 2 * num_bytes]

    def seed(self) -> int:
        return int(self.derive("seed", 8), 16) >> 1  # of 63 bits


def note_body(request: Request, raw: bytes) -> None:
    """Remember the hash of a body that was read, if the request has a key."""
    if HEADER in request.headers:
        digest = hashlib.sha256(request.url.path.encode() + b"\n")
        digest.update(raw)
        setattr(request.state, _BODY, digest.hexdigest())


def key_of(request: Request, tenant: str) -> Key | None:
    """The key of a request whose body was read. Raises ``InvalidRequest`` for one that is malformed."""
    given = request.headers.getlist(HEADER)
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(f"{HEADER} stands there {len(given)} times: send one", code="invalid_header")
    if not _PRINTABLE.fullmatch(given[0]):
        raise InvalidRequest(
            f"{HEADER} has {len(given[0])} characters: it must have 1 to {MAX_LENGTH}, printable ASCII ones, "
            "such as a UUID",
            code="invalid_header",
        )
    name = hashlib.sha256(f"{tenant}\n{given[0]}".encode()).hexdigest()
    return Key(name, getattr(request.state, _BODY))


def drawn_id(key: Key | None, purpose: str, num_bytes: int) -> str:
    """Hexadecimal digits that follow from the key, or random ones without."""
    return secrets.token_hex(num_bytes) if key is None else key.derive(purpose, num_bytes)


def numbered_ids(key: Key | None, purpose: str, num_bytes: int) -> Callable[[], str]:
    """A source of such ids, one after the other."""
    numbers = count()
    return lambda: drawn_id(key, f"{purpose}/{next(numbers)}", num_bytes)


class KeyBook:
    """The bodies that keys stand for, as far as this gateway has seen them."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._bodies: OrderedDict[str, str] = OrderedDict()
        self._max_remembered = max_remembered

    def check(self, key: Key) -> None:
        """Raises ``IdempotencyKeyReused`` when this key stands for another body."""
        if self._bodies.get(key.name, key.body) != key.body:
            raise IdempotencyKeyReused(
                f"this {HEADER} was sent with another body: send the same one, or another key", param=HEADER
            )

    def note(self, key: Key) -> None:
        """An engine has taken the request: from now on the key stands for this body."""
        self._bodies[key.name] = key.body
        self._bodies.move_to_end(key.name)
        if len(self._bodies) > self._max_remembered:
            self._bodies.popitem(last=False)
