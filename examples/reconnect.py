"""A stream that survives its connection: the same Idempotency-Key at the next address, without what was shown already.

pip install openai
python examples/reconnect.py [BASE_URL,BASE_URL,…] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
"""

import os
import sys
import time
import uuid
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import httpx
from openai import APIError, APIStatusError, OpenAI

urls = (sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLX_CLUSTER_URL", "http://127.0.0.1:8000")).split(",")
model = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("MLX_CLUSTER_MODEL", "demo")


class Reconnecting:
    """The text of streamed chats, over several base URLs; ``reconnections`` counts how often it had to come back."""

    def __init__(self, base_urls: list[str], attempts: int = 20, pause_seconds: float = 0.5) -> None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        # This wrapper does the trying again, at the next address.
        clients = [OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) for url in base_urls]
        self._clients = cycle(clients)
        self._attempts, self._pause_seconds = attempts, pause_seconds
        self.reconnections = 0

    def chat(self, **body: Any) -> Iterator[str]:
        """The pieces of one answer's text, each once. Raises what trying again would not change."""
        headers, shown = {"Idempotency-Key": str(uuid.uuid4())}, 0
        for attempt in range(self._attempts):
            if attempt:
                self.reconnections += 1
                time.sleep(self._pause_seconds)
            try:
                client = next(self._clients)
                position = 0
                for chunk in client.chat.completions.create(**body, stream=True, extra_headers=headers):
                    for choice in chunk.choices:
                        # The answer comes from its beginning, perhaps in other pieces: count characters, not chunks.
                        text = choice.delta.content or ""
                        new = text[max(0, shown - position) :]
                        position += len(text)
                        if new:
                            shown = position
                            yield new
                        if choice.finish_reason is not None:
                            return
            except APIStatusError as error:
                if error.status_code < 500 and error.status_code != 429:
                    raise
            except (APIError, httpx.TransportError):
                pass  # the connection broke, or the stream ended with an error event
        raise ConnectionError(f"no answer after {self._attempts} attempts")


cluster = Reconnecting(urls)
question = [{"role": "user", "content": "What happens when a node dies?"}]
answer = cluster.chat(model=model, messages=question, temperature=0, max_tokens=100)
for piece in answer:
    print(piece, end="", flush=True)
print(f"\nreconnections: {cluster.reconnections}")
