"""Compressed links between real stage processes: who compresses, how many bytes that saves, and nothing when off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_cluster.stage.spec import StageSpec
from tests.e2e.stage_pipeline import running_stages, say
from tests.tiny_models import write_tiny_model

CUTS = [0, 1, 2, 3]
PROMPT = tuple((7 * i) % 256 for i in range(40))


async def test_only_the_links_that_are_told_compress(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny", layers=3, width=64, vocab=320)

    def first_hop(spec: StageSpec) -> StageSpec:
        return replace(spec, compression="int8") if spec.index == 0 else spec

    async with running_stages(model_dir, CUTS, change=first_hop) as engine:
        said = await say(engine, PROMPT, 5)
        assert len(said.tokens) == 5
        figures = engine.statistics()
        sent, saved = figures["sent_bytes"], figures["saved_bytes"]
        assert sent[1] == sent[0] + saved[0], "the same float32 states cross both hops"
        assert sent[0] * 64 * 4 == sent[1] * 66, "64 values in 66 bytes instead of 256"
        assert saved[1:] == [0, 0]
