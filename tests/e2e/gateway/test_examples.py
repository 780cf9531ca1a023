"""Every program in ``examples/``, run as a user runs it, against a real cluster."""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "examples"
STAGE = "A stage is a contiguous range of the model's layers that runs in its own process on one node."
# What each must print; the demo model knows these answers by heart.
EXPECTED = {
    "openai_chat.py": (STAGE, "The other nodes notice it within seconds.", " tokens"),
    "openai_tools.py": ("the model calls weather({'city': '",),
    "openai_structured.py": (" on [",),
    "reconnect.py": ("The other nodes notice it within seconds.", "reconnections: 0"),
    "anthropic_messages.py": (STAGE, "The other nodes notice it within seconds.", "the model calls weather({'city': '"),
    "langchain_chat.py": (STAGE, "sure=", "where=["),
    "curl.sh": ('"id": "demo"', STAGE, "data: [DONE]", '"type": "message"', '"count": '),
}


def test_every_example_is_run_and_listed() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh")}
    assert files == set(EXPECTED)
    page = (FOLDER / "README.md").read_text()
    assert all(f"({name})" in page for name in files)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_example_prints_what_it_promises(name: str, url: str) -> None:
    if name.endswith(".sh") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = [sys.executable, str(FOLDER / name)] if name.endswith(".py") else ["bash", str(FOLDER / name)]
    environment = {**os.environ, "MLX_CLUSTER_URL": url, "LANGSMITH_TRACING": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    # curl prints JSON as it comes: a comma or colon may have a space behind it or not.
    for text in EXPECTED[name]:
        assert text.replace(" ", "") in done.stdout.replace(" ", ""), done.stdout
    assert "arning" not in done.stderr


@pytest.fixture
def cutting(url: str) -> Iterator[str]:
    """The address of a way to the gateway that breaks off inside of each answer."""
    host, _, port = url.removeprefix("http://").partition(":")

    class Cut(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, int(port)), timeout=60) as gateway:
                asked = b""
                while not asked.endswith(b"}") and (data := self.request.recv(1 << 16)):
                    asked += data  # headers and body may come apart
                gateway.sendall(asked)
                passed = 0
                while passed < 2500 and (data := gateway.recv(500)):
                    self.request.sendall(data)
                    passed += len(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Cut) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(20)


def test_a_broken_stream_goes_on_at_the_next_address(url: str, cutting: str) -> None:
    def shown(addresses: str) -> list[str]:
        command = [sys.executable, str(FOLDER / "reconnect.py"), addresses]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.rsplit("\n", 2)

    text, count, _ = shown(url)
    assert count == "reconnections: 0"
    assert shown(f"{cutting},{url}") == [text, "reconnections: 1", ""]


def test_the_address_may_be_an_argument(url: str) -> None:
    command = [sys.executable, str(FOLDER / "openai_chat.py"), url, "gpt-4o-mini"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert STAGE in done.stdout
