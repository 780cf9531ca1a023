"""The prefix cache over real stage processes: who shares, what a turn of a chat saves, a stage that lost an entry."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_cluster import demo
from mlx_cluster.stage.spec import DiskSpec, FaultSpec, StageSpec
from tests.e2e.cluster_processes import ClusterProcesses, running
from tests.e2e.stage_pipeline import PREFIX, running_stages, say
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.timeout(240)

CUTS = [0, 3, 6]
PROMPT = tuple((7 * i) % 256 for i in range(70))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("m") / "tiny", layers=6, width=64, vocab=320)


async def test_a_stage_that_forgot_an_entry_costs_one_fallback_and_no_token(model_dir: Path) -> None:
    def forgetful(spec: StageSpec) -> StageSpec:
        """Stage 1 loses the first entry that it stores, stage 0 keeps it."""
        return replace(spec, faults=FaultSpec(forget_stores=(0,))) if spec.index == 1 else spec

    async with running_stages(model_dir, CUTS, change=forgetful) as engine:
        first = await say(engine, PROMPT, 1)
        again = await say(engine, PROMPT, 1)
        assert again.tokens == first.tokens
        assert (first.cached, again.cached) == (0, 0)
        assert engine.statistics()["prefix_fallbacks"] == 1
        third = await say(engine, PROMPT, 1)
        assert third.tokens == first.tokens
        assert third.cached == len(PROMPT) - 1, "the fallback's own entry is whole again"
        assert engine.statistics()["prefix_fallbacks"] == 1


async def test_tenants_share_with_themselves_only(model_dir: Path) -> None:
    async with running_stages(model_dir, CUTS) as engine:
        expected = (await say(engine, PROMPT, 3, tenant="a")).tokens
        for tenant, cached in (("b", 0), ("a", len(PROMPT) - 1), ("", 0), ("b", len(PROMPT) - 1)):
            said = await say(engine, PROMPT, 3, tenant=tenant)
            assert (said.tokens, said.cached) == (expected, cached)
        figures = engine.statistics()
        assert (figures["prefix_hits"], figures["prefix_hit_tokens"]) == (2, 2 * (len(PROMPT) - 1))
        assert figures["prefix_entries"] >= 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    with running(ClusterProcesses(tmp_path_factory.mktemp("cluster"), Path(demo.model_dir()), num_nodes=2)) as two:
        two.wait_ready()
        yield two


def turn(cluster: ClusterProcesses, node: int, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 60}
    answer = httpx.post(f"{cluster.gateway(node)}/v1/chat/completions", json=body, timeout=90, trust_env=False)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_chat_says_how_much_of_it_was_cached_its_own_answers_included(cluster: ClusterProcesses) -> None:
    messages = [{"role": "user", "content": "What are you?"}]
    before = 0
    for question in ("How do I start a cluster?", "What are you?"):
        answer = turn(cluster, 0, messages)
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        # All of the last turn is reused, the generated tokens too, but for its last one, which was never computed.
        assert cached == before
        said = answer["choices"][0]
        assert said["finish_reason"] == "stop"
        before = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        messages += [said["message"], {"role": "user", "content": question}]
    usage = turn(cluster, 1, messages)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= before, "through another gateway it is the same engine"
    metrics = httpx.get(f"http://127.0.0.1:{cluster.first_port + 2}/metrics", timeout=10, trust_env=False).text
    figures = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("mlx_cluster_engine_"))
    assert float(figures['mlx_cluster_engine_prefix_hits_total{model="tiny",pipeline="tiny"}']) == 2
    assert float(figures['mlx_cluster_engine_prefix_hit_tokens_total{model="tiny",pipeline="tiny"}']) > before
    assert float(figures['mlx_cluster_engine_prefix_fallbacks_total{model="tiny",pipeline="tiny"}']) == 0
    assert float(figures['mlx_cluster_engine_prefix_entries{model="tiny",pipeline="tiny"}']) >= 1
    assert float(figures['mlx_cluster_engine_prefix_bytes{model="tiny",pipeline="tiny"}']) > 0


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


async def wait_for_files(folder: Path, count: int) -> list[Path]:
    """Entries are written behind the stages' backs."""
    async with asyncio.timeout(60):
        while len(files := files_in(folder)) < count:
            await asyncio.sleep(0.05)
    return files


async def test_entries_on_the_disk_survive_a_restart_of_all_stages(model_dir: Path, tmp_path: Path) -> None:
    def with_disk(spec: StageSpec) -> StageSpec:
        return replace(spec, prefix_disk=DiskSpec(str(tmp_path), 1 << 30))

    limits = replace(PREFIX, disk_max_bytes=1 << 30)
    longer = (*PROMPT, 1, 2, 3)
    async with running_stages(model_dir, CUTS, change=with_disk, prefix=limits) as engine:
        await say(engine, PROMPT, 1, tenant="a")
        files = await wait_for_files(tmp_path, 2)
    assert len({path.parent for path in files}) == 2, "a folder for each slice"

    async with running_stages(model_dir, CUTS, change=with_disk, prefix=limits) as engine:
        assert engine.statistics()["prefix_disk_entries"] == 1
        whole = await say(engine, longer, 4, tenant="b")
        said = await say(engine, longer, 4, tenant="a")
        assert (said.tokens, said.cached, whole.cached) == (whole.tokens, len(PROMPT), 0)
        figures = engine.statistics()
        assert (figures["prefix_disk_hits"], figures["prefix_fallbacks"]) == (1, 0)
        await wait_for_files(tmp_path, 4)

    damaged = files[-1]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for path in set(files_in(tmp_path)) - set(files):
        path.unlink()
    async with running_stages(model_dir, CUTS, change=with_disk, prefix=limits) as engine:
        said = await say(engine, longer, 4, tenant="a")
        assert (said.tokens, said.cached) == (whole.tokens, 0)
        assert engine.statistics()["prefix_fallbacks"] == 1, "one stage found its file damaged"
        assert not damaged.exists()
