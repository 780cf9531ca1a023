"""Which Host and Origin a gateway answers to.

Owns: the refusal of foreign names and pages on loopback, and the CORS allow list.
Does not own: where the check stands (``middleware``), keys.
Invariant: a page from elsewhere cannot use a gateway that asks for no key, neither by its own origin nor by a name of
its own that it lets point here (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlx_cluster.config.names import is_loopback
from mlx_cluster.config.schema import ApiGatewaySection
from mlx_cluster.gateway.errors import Forbidden

ANY = "*"
METHODS = b"GET, POST, DELETE, OPTIONS"
EXPOSED = b"x-request-id, retry-after, retry-after-ms, x-should-retry, x-mlx-cluster-ignored, request-id"
PREFLIGHT_SECONDS = b"600"
MAX_ASKED_HEADERS_BYTES = 1024  # of a preflight; it is echoed
_DEFAULT_PORTS = {"http": 80, "https": 443}

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """``guarded``: without a key on loopback, where the names in a request are all there is to judge by."""

    guarded: bool
    hosts: frozenset[str]
    origins: frozenset[str]

    @classmethod
    def of(cls, settings: ApiGatewaySection) -> OriginPolicy:
        """The policy of a gateway that asks for no keys."""
        hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        origins = frozenset(origin.lower() for origin in settings.allowed_origins)
        return cls(is_loopback(settings.host), hosts, origins)

    def check(self, host: str | None, origin: str | None) -> None:
        """Raise ``Forbidden`` for a request that a foreign page may have made. None: the header is absent."""
        if not self.guarded:
            return
        # Without a Host (HTTP/1.0) no browser asks.
        if host is not None and not self._knows_host(host):
            raise Forbidden(
                f"the Host {host[:128]!r} is not a name of this gateway: use 127.0.0.1 or localhost, or add the name "
                "to api_gateway.allowed_hosts",
                code="host_not_allowed",
            )
        if origin is not None and not self.allows(origin) and not _same_place(origin, host):
            raise Forbidden(
                f"pages of {origin[:128]!r} may not use this gateway: add the origin to api_gateway.allowed_origins",
                code="origin_not_allowed",
            )

    def allows(self, origin: str) -> bool:
        """Whether the allow list lets pages of this origin read answers."""
        return ANY in self.origins or origin.lower() in self.origins

    def answer_headers(self, origin: str | None) -> Headers:
        """What every answer to this origin carries."""
        if not self.origins:
            return []
        varies = [(b"vary", b"origin")]
        if origin is None or not self.allows(origin):
            return varies
        return [
            *varies,
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED),
        ]

    def preflight_headers(self, asked: Mapping[bytes, bytes]) -> Headers:
        """What an allowed preflight is told, beside ``answer_headers``."""
        headers = [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-max-age", PREFLIGHT_SECONDS),
        ]
        wanted = asked.get(b"access-control-request-headers", b"")[:MAX_ASKED_HEADERS_BYTES]
        if wanted:
            headers.append((b"access-control-allow-headers", wanted))
        if asked.get(b"access-control-request-private-network") == b"true":
            headers.append((b"access-control-allow-private-network", b"true"))
        return headers

    def _knows_host(self, host: str) -> bool:
        place = _place(f"//{host}")
        if place is None:
            return False
        name = place[0]
        return is_loopback(name) or name.endswith(".localhost") or name in self.hosts or ANY in self.hosts


def _same_place(origin: str, host: str | None) -> bool:
    """Whether the page came from the very host and port that it now asks."""
    if host is None:
        return False
    scheme = origin.partition(":")[0].lower()
    page, asked = _place(origin), _place(f"//{host}")
    if page is None or asked is None or scheme not in _DEFAULT_PORTS:
        return False
    default = _DEFAULT_PORTS[scheme]
    return (page[0], page[1] or default) == (asked[0], asked[1] or default)


def _place(url: str) -> tuple[str, int | None] | None:
    """Host name in lower case without a final dot, and port; None for what is neither."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or "@" in parts.netloc or parts.path not in ("", "/"):
        return None
    return name.lower().removesuffix("."), port
