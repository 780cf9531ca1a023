"""The page at ``/``: a chat for people, a hint for programs, and the files of the page.

Owns: which form of ``/`` a client gets, the files in ``web/`` and their headers.
Does not own: what the page talks to (the API's own routes).
Invariant: the page loads nothing from elsewhere, and its policy forbids the browser to.
"""

from __future__ import annotations

from importlib import resources
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from mlx_cluster.gateway.answer import Gateway
from mlx_cluster.gateway.errors import RouteNotFound

# The whole list: what is not named here is not served, whatever lies in the folder.
MEDIA_TYPES = MappingProxyType(
    {
        "index.html": "text/html; charset=utf-8",
        "style.css": "text/css; charset=utf-8",
        "app.js": "text/javascript; charset=utf-8",
        "stream.js": "text/javascript; charset=utf-8",
        "clients.js": "text/javascript; charset=utf-8",
        "icon.svg": "image/svg+xml",
    }
)

HEADERS = MappingProxyType(
    {
        "content-security-policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",  # a node that was updated must not be used through its old page
    }
)

ROUTES = (
    ("GET", "/v1/models", "the models that are served here"),
    ("POST", "/v1/chat/completions", "a chat"),
    ("POST", "/v1/completions", "a plain prompt"),
    ("POST", "/v1/responses", "OpenAI's newer form, streamed, stored or in the background"),
    ("POST", "/v1/messages", "Anthropic's form; their clients take {base} as base URL"),
    ("POST", "/tokenize", "text or a conversation to token ids; /detokenize goes back"),
    ("GET", "/health", "this node's state; also /livez, /readyz and /metrics"),
)

TRY = """Try:

    curl {base}v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""


def add_web_page(app: FastAPI, gateway: Gateway) -> None:
    """Add ``/`` and ``/web/…``."""
    folder = resources.files("mlx_cluster.gateway") / "web"
    files = {name: (folder / name).read_bytes() for name in MEDIA_TYPES}

    def page_file(name: str) -> Response:
        return Response(files[name], media_type=MEDIA_TYPES[name], headers={**HEADERS, "vary": "accept"})

    @app.get("/", include_in_schema=False)
    async def front(request: Request) -> Response:
        accepted = request.headers.get("accept", "")
        if "text/html" in accepted:
            return page_file("index.html")
        models = gateway.catalogue.models()
        base, model = str(request.base_url), models[0].id if models else "MODEL"
        headers = {"vary": "accept"}
        if "application/json" in accepted:
            return JSONResponse(_hint_object(base, model), headers=headers)
        return PlainTextResponse(_hint_text(base, model), headers=headers)

    @app.get("/web/{name}", include_in_schema=False)
    async def web_file(name: str) -> Response:
        if name not in files:
            raise RouteNotFound(f"there is no GET /web/{name[:64]}; the page is at GET /")
        return page_file(name)


def _hint_object(base: str, model: str) -> dict[str, Any]:
    routes = [{"method": method, "path": path, "what": what.format(base=base)} for method, path, what in ROUTES]
    return {"name": "mlx-cluster", "base_url": f"{base}v1", "model": model, "routes": routes}


def _hint_text(base: str, model: str) -> str:
    lines = [f"  {method:<5}{path:<22}{what.format(base=base)}" for method, path, what in ROUTES]
    return "\n".join(["mlx-cluster: an OpenAI-compatible API.", "", *lines, "", TRY.format(base=base, model=model)])
