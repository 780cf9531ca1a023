"""Who asks: the tenant behind an API key, and what that key may do against others.

Owns: reading the key from a request's headers, its hash, the settings of the keys that are listed.
Does not own: authentication. There is none here: a key that is not listed, or none at all, is served like any other;
its hash only keeps its prefix cache, its place in queues and its cached answers apart from everybody else's.
Invariant: a key is compared by its hash in constant time, and is neither kept nor logged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_cluster.config.schema import TENANT_HEX_DIGITS, ApiGatewaySection
from mlx_cluster.errors import InvalidRequest

NO_KEY = "none"
OTHER_KEY = "other"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request. ``label`` names it in metrics and comes from the settings, never from a client."""

    tenant: str = ""
    label: str = NO_KEY
    max_priority: int = 0
    queue_seconds: float | None = None

    def priority(self, asked: int | None) -> int:
        """The priority of a request that asks for ``asked``. Raises ``InvalidRequest`` where it may not have it."""
        if asked is None:
            return self.max_priority
        if asked > self.max_priority:
            raise InvalidRequest(
                f"priority is {asked}, but requests of this key may have at most {self.max_priority}: leave it out, "
                "lower it, or have the key's priority raised in api_gateway.keys",
                param="priority",
                code="invalid_value",
            )
        return asked


NOBODY = Caller()


class Keys:
    """Every key that is listed in the settings."""

    def __init__(self, settings: ApiGatewaySection) -> None:
        self._queue_seconds = settings.queue_timeout
        self._listed = settings.keys

    def caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Who presents these headers: ``Authorization: Bearer KEY``, or ``x-api-key: KEY``."""
        key = _presented(headers)
        if key is None:
            return Caller(queue_seconds=self._queue_seconds)
        digest = hashlib.sha256(key).hexdigest()
        found = None
        for listed in self._listed:  # all of them: how long this takes must not tell which one it is
            if hmac.compare_digest(listed.sha256, digest):
                found = listed
        if found is None:
            return Caller(digest[:TENANT_HEX_DIGITS], OTHER_KEY, queue_seconds=self._queue_seconds)
        return Caller(found.tenant, found.name, found.priority, self._queue_seconds)


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    named = dict(headers)
    scheme, _, token = named.get(b"authorization", b"").partition(b" ")
    key = token.strip() if scheme.lower() == b"bearer" else b""
    return key or named.get(b"x-api-key", b"").strip() or None
