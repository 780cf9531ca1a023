"""One real node with little room: who waits, who is refused and when to come back, what is computed only once."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster_processes import ClusterProcesses, running, within
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.timeout(240)

FAST = "sk-fast"
SETTINGS: dict[str, Any] = {
    "api_gateway": {
        "queue_timeout": 6.0,  # long enough for a slow machine to send one more meanwhile
        "keys": [{"name": "fast", "sha256": hashlib.sha256(FAST.encode()).hexdigest(), "priority": 5}],
    },
    "scheduler": {"max_queue": 2, "share_identical": True},
    "runtime": {"response_cache": {"enabled": True, "path": "answers.sqlite3"}},
}


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}


def metric(cluster: ClusterProcesses, name: str) -> float:
    """The value of the first line that begins so."""
    lines = httpx.get(f"{cluster.gateway(0)}/metrics", timeout=10, trust_env=False).text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


def engine(cluster: ClusterProcesses) -> dict[str, Any]:
    found = cluster.admin("/engines", offset=0)
    return dict(found["engines"][0]) if found and found["engines"] else {}


async def post(client: httpx.AsyncClient, cluster: ClusterProcesses, content: dict[str, Any], key: str = "") -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await client.post(f"{cluster.gateway(0)}/v1/completions", json=content, headers=headers)


async def overload(cluster: ClusterProcesses) -> None:
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        # One row, which somebody has for long; two may wait, and not for long.
        holder = asyncio.create_task(post(client, cluster, body("a long one", 3000)))
        await asyncio.to_thread(within, "the row is taken", lambda: engine(cluster).get("rows") == 1)
        waiters = [asyncio.create_task(post(client, cluster, body(f"waits {i}", 2, seed=i))) for i in range(2)]
        await asyncio.to_thread(within, "two wait", lambda: engine(cluster).get("waiting") == 2)
        refused = await post(client, cluster, body("too many", 2, seed=9))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        for answer in await asyncio.gather(*waiters):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "queue_timeout"
            assert int(answer.headers["retry-after"]) >= 1
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)
        await asyncio.to_thread(within, "the row is free", lambda: engine(cluster).get("rows") == 0)
        # The same greedy request four times at once, and once more: computed once.
        drawn = engine(cluster)["tokens"]
        same = body("the same", 40, temperature=0)
        answers = await asyncio.gather(*(post(client, cluster, same, FAST) for _ in range(4)))
        answers.append(await post(client, cluster, same, FAST))
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {answers[0].json()["choices"][0]["text"]}
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {40}
        figures = engine(cluster)
        assert figures["tokens"] == drawn + 40
        assert figures["shared"] + figures["response_cache_hits"] == 4
        assert figures["response_cache_hits"] >= 1
        # Another key has answers of its own.
        other = await post(client, cluster, same)
        assert other.json()["choices"] == answers[0].json()["choices"]
        assert engine(cluster)["tokens"] == drawn + 80
        too_high = await post(client, cluster, body("x", 1, priority=6), FAST)
        assert too_high.status_code == 400
        assert too_high.json()["error"]["param"] == "priority"
        assert (await post(client, cluster, body("x", 1, priority=5), FAST)).status_code == 200


def test_a_small_node_under_overload(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", layers=4, width=32, vocab=320)
    cluster = ClusterProcesses(tmp_path, model, num_nodes=1, settings=SETTINGS)
    path = tmp_path / "cluster.yaml"
    # A model's own bound, over the scheduler's.
    path.write_text(path.read_text().replace("  tiny:\n", "  tiny:\n    batching: {max_batch: 1}\n"))
    with running(cluster):
        cluster.wait_ready()
        asyncio.run(overload(cluster))
        assert metric(cluster, "mlx_cluster_engine_response_cache_entries{") >= 2
        assert metric(cluster, 'mlx_cluster_gateway_key_requests_total{key="fast"}') == 6
    assert (tmp_path / "state0" / "answers.sqlite3").stat().st_size > 0
