"""``mlx-cluster chat``: talk to a model in the terminal, through any gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_cluster.errors import ClusterError, Unavailable

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this one question instead of a conversation.")] = None,
    url: Annotated[str, typer.Option("--url", help="Of any gateway.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the first one served.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0)] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="MLX_CLUSTER_API_KEY")] = None,
) -> None:
    """Chat with streamed answers. Ctrl-C stops an answer, Ctrl-D or /quit ends, /clear forgets."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # A first token may take long (a queue, a recovery); the gateway ends what takes too long, with a reason.
    timeout = httpx.Timeout(10.0, read=600.0)
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False) as client:
        body: dict[str, Any] = {"model": model or first_model(client)}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if temperature is not None:
            body["temperature"] = temperature
        if prompt is not None:
            _answer(client, body, [*history, {"role": "user", "content": prompt}])
            return
        _converse(client, body, history)


def _converse(client: httpx.Client, body: dict[str, Any], history: list[Message]) -> None:
    start = list(history)
    _enable_line_editing()
    print(f"{body['model']} (Ctrl-D ends, /clear forgets)", file=sys.stderr)
    while (text := _read_line()) is not None:
        match text.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/clear":
                history = list(start)
                continue
        asked = [*history, {"role": "user", "content": text}]
        try:
            answer = _answer(client, body, asked)
        except ClusterError as error:  # the conversation goes on: the cluster may be back for the next question
            print(f"mlx-cluster: {error}", file=sys.stderr)
            continue
        history = [*asked, {"role": "assistant", "content": answer}]


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  # importing it gives input() its line editing and history
    except ImportError:
        pass


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _answer(client: httpx.Client, body: dict[str, Any], messages: list[Message]) -> str:
    """Print the answer as it comes; Ctrl-C closes the stream, which cancels it on the cluster. The text so far."""
    parts: list[str] = []
    try:
        for part in stream_chat(client, {**body, "messages": messages, "stream": True}):
            parts.append(part)
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    finally:
        print(flush=True)
    return "".join(parts)


def first_model(client: httpx.Client) -> str:
    """The id of the first model the gateway serves. Raises ``Unavailable`` when it serves none."""
    import httpx

    try:
        answer = client.get("/models")
        raise_for_status(answer.status_code, answer.text)
        models = answer.json().get("data", [])
    except (httpx.TransportError, ValueError) as error:
        raise Unavailable(
            f"no gateway answers at {client.base_url} ({error}): start one with 'mlx-cluster up'"
        ) from error
    if not models:
        raise Unavailable(f"{client.base_url} serves no model: wait until it is loaded, see 'mlx-cluster status'")
    return str(models[0]["id"])


def stream_chat(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """Pieces of text of one streamed answer. Raises ``Unavailable`` with the server's words."""
    import httpx

    try:
        with client.stream("POST", "/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise_for_status(answer.status_code, answer.text)
            yield from text_of_events(answer.iter_lines())
    except httpx.TransportError as error:
        raise Unavailable(f"the connection to {client.base_url} was lost: {error or type(error).__name__}") from error


def text_of_events(lines: Iterable[str]) -> Iterator[str]:
    """Server-sent events → pieces of text, until ``[DONE]``. Raises ``Unavailable`` on an error or a cut stream."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise Unavailable(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            yield from (text for key in ("reasoning_content", "content") if (text := delta.get(key)))
    raise Unavailable("the stream ended before the answer did: the gateway is gone")


def raise_for_status(status_code: int, text: str) -> None:
    """Raise ``Unavailable`` with the message of the error object unless the status is a success."""
    if status_code < 400:
        return
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text[:200]
    raise Unavailable(f"HTTP {status_code}: {message}")
