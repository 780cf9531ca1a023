"""What only real stages can show of the gateway: scores of a prompt, vectors, and responses that another node keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_cluster.tokenizer import load
from tests.e2e.cluster_processes import ClusterProcesses, running
from tests.tiny_models import write_tiny_model

TEXT = "the cat sat on the mat, the dog on the log"


@pytest.mark.timeout(300)
def test_prompts_are_read_through_two_stages(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "model", layers=4, width=64, vocab=320, family="qwen3")
    entry: dict[str, Any] = {"path": str(model_dir), "split": "2/2", "embeddings": "mean"}
    cluster = ClusterProcesses(tmp_path, model_dir, num_nodes=2, settings={"models": {"tiny": entry}})
    ids = load(model_dir).encode(TEXT)
    model, _ = load_model(model_dir)
    model.set_dtype(mx.float32)
    logits = model(mx.array([ids]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    states = model.model(mx.array([ids]))[0].mean(axis=0)
    with running(cluster) as two:
        two.wait_ready(0, 1)
        with httpx.Client(timeout=120) as client:
            body = {"model": "tiny", "prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": 0}
            for node in (0, 1):  # the second gateway's engine is on another node
                answer = client.post(f"{two.gateway(node)}/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                (choice,) = answer.json()["choices"]
                assert choice["text"] == TEXT
                expected = [None, *(logprobs[at, token].item() for at, token in enumerate(ids[1:]))]
                assert choice["logprobs"]["token_logprobs"][0] is None
                assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[1:], abs=1e-3)
                answer = client.post(f"{two.gateway(node)}/v1/embeddings", json={"model": "tiny", "input": [TEXT, "a"]})
                assert answer.status_code == 200, answer.text
                vector = answer.json()["data"][0]["embedding"]
                assert vector == pytest.approx((states / mx.linalg.norm(states)).tolist(), abs=1e-3)
            made = client.post(
                f"{two.gateway(0)}/v1/responses", json={"model": "tiny", "input": "a", "max_output_tokens": 2}
            )
            found = client.get(f"{two.gateway(1)}/v1/responses/{made.json()['id']}")
            assert (found.status_code, found.json()["output"]) == (200, made.json()["output"])
