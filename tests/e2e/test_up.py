"""``mlx-cluster up`` as a new user meets it: the ready line, answers about the project, and ends that leave nothing."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from mlx_cluster import demo
from mlx_cluster.config.ports import is_free
from tests.e2e.cluster_processes import alive, free_block, within

READY_SECONDS = 120.0
EXAMPLES = json.loads((Path(demo.__file__).parent / "corpus" / "examples.json").read_text())


class Up:
    """The launcher on free ports; its output line by line."""

    def __init__(self, *arguments: str) -> None:
        self.first_port = free_block(60)
        self.url = f"http://127.0.0.1:{self.first_port}"
        self.admin = f"http://127.0.0.1:{self.first_port + 50}"
        ports = ["--gateway-port", str(self.first_port), "--base-port", str(self.first_port + 10)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_cluster", "up", *ports, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "MLX_CLUSTER__COORDINATOR__PORT": str(self.first_port + 50), "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def ready_line(self) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while (line := self._queue.get(timeout=max(0.1, deadline - time.monotonic()))) is not None:
            self.lines.append(line)
            if line.startswith("ready "):
                return line
        raise AssertionError("up ended:\n" + "\n".join(self.lines))

    def pids(self) -> list[int]:
        """Agents and stage processes."""
        picture = httpx.get(f"{self.admin}/cluster", timeout=5, trust_env=False).json()
        return [n["pid"] for n in picture["nodes"]] + [s["pid"] for p in picture["pipelines"] for s in p["stages"]]

    def rest(self) -> str:
        """Everything that it printed, once it has ended."""
        self._reader.join(30)
        while (line := self._queue.get_nowait() if not self._queue.empty() else None) is not None:
            self.lines.append(line)
        return "\n".join(self.lines)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        self._reader.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def up(*arguments: str) -> Iterator[Up]:
    launcher = Up(*arguments)
    try:
        yield launcher
    finally:
        launcher.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Up]:
    with up("--alias", "gpt-4o-mini") as launcher:
        launcher.ready = launcher.ready_line()  # type: ignore[attr-defined]
        yield launcher


def ask(client: openai.OpenAI, question: str, model: str = "demo") -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=120
    )
    return answer.choices[0].message.content or ""


def test_the_ready_line_names_url_model_layers_and_transport(cluster: Up) -> None:
    line = cluster.ready  # type: ignore[attr-defined]
    assert line.startswith(f"ready {cluster.url}/v1  model demo  mini1[0-10) mini2[10-19) master[19-28)  transport ")


def test_the_examples_get_their_answers_through_the_openai_client(cluster: Up) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        for example in EXAMPLES:
            assert ask(client, example["question"]) == example["answer"]


def test_a_passage_said_again_is_drafted_and_comes_out_the_same(cluster: Up) -> None:
    """The conversation so far has what the model is about to say: drafts come true, and change nothing."""
    example = EXAMPLES[1]
    conversation = [
        {"role": "user", "content": example["question"]},
        {"role": "assistant", "content": example["answer"]},
        {"role": "user", "content": example["question"]},
    ]
    body = {"model": "demo", "messages": conversation, "temperature": 0, "max_tokens": 120}
    texts = {}
    for wish in (False, True):
        before = accepted_tokens(cluster)
        answer = httpx.post(
            f"{cluster.url}/v1/chat/completions", json={**body, "speculation": wish}, timeout=60, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        texts[wish] = answer.json()["choices"][0]["message"]["content"]
        accepted = accepted_tokens(cluster) - before
        assert accepted > 10 if wish else accepted == 0
    assert texts[True] == texts[False] == example["answer"]


def accepted_tokens(cluster: Up) -> float:
    text = httpx.get(f"{cluster.url}/metrics", timeout=10, trust_env=False).text
    (line,) = [line for line in text.splitlines() if line.startswith("mlx_cluster_engine_accepted_tokens_total{")]
    return float(line.rpartition(" ")[2])


def test_streaming_says_the_same_and_an_alias_answers(cluster: Up) -> None:
    example = EXAMPLES[0]
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini",
            messages=[{"role": "user", "content": example["question"]}],
            temperature=0,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == example["answer"]


def test_the_terminal_chat_streams_an_answer(cluster: Up) -> None:
    command = [sys.executable, "-m", "mlx_cluster", "chat", "--url", f"{cluster.url}/v1", EXAMPLES[0]["question"]]
    done = subprocess.run([*command, "--temperature", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.split()) == EXAMPLES[0]["answer"]


def test_status_shows_nodes_and_stages(cluster: Up) -> None:
    command = [sys.executable, "-m", "mlx_cluster", "status", "--json", "--url", cluster.admin]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    picture = json.loads(done.stdout)
    assert [(s["start"], s["end"]) for s in picture["pipelines"][0]["stages"]] == [(0, 10), (10, 19), (19, 28)]
    assert all(stage["memory_bytes"] > 0 for stage in picture["pipelines"][0]["stages"])


def test_a_second_cluster_on_the_same_ports_is_refused_by_name(cluster: Up) -> None:
    command = [sys.executable, "-m", "mlx_cluster", "up", "--gateway-port", str(cluster.first_port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{cluster.first_port}" in done.stderr
    assert httpx.get(f"{cluster.url}/readyz", timeout=5, trust_env=False).status_code == 200


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_every_end_of_the_launcher_ends_every_process(how: signal.Signals) -> None:
    with up("--nodes", "2") as launcher:
        launcher.ready_line()
        pids = launcher.pids()
        assert len(pids) == 4
        launcher.process.send_signal(how)
        launcher.process.wait(30)
        within("all processes end", lambda: not any(map(alive, pids)), 30)
        assert "Traceback" not in launcher.rest()


def test_a_configured_witness_votes_here_too_and_ends_with_the_nodes(tmp_path: Path) -> None:
    """Without it two nodes could decide nothing while one of them is away."""
    (tmp_path / "cluster.yaml").write_text(
        "cluster:\n  nodes: [{host: mini1.lan, node_id: 0}, {host: mini2.lan, node_id: 1}]\n"
        "  witness: {host: nas.lan, port: 8451}\n"
    )
    with up("--config", str(tmp_path), "--model", "demo") as launcher:
        launcher.ready_line()

        def voters() -> list[str]:
            answer = httpx.get(f"{launcher.admin}/cluster", timeout=5, trust_env=False)
            return sorted(voter["name"] for voter in answer.json()["election"]["voters"])

        within("all three vote", lambda: voters() == ["mini1", "mini2", "witness"])
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.process.wait(30) == 0
        assert "Traceback" not in launcher.rest()
    assert is_free("127.0.0.1", launcher.first_port + 19), "the witness is gone"
