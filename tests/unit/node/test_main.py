"""What a node makes of its settings for an engine."""

from __future__ import annotations

from pathlib import Path

from mlx_cluster.config.schema import Settings, SpeculationSection
from mlx_cluster.engine.prefix import RowCost
from mlx_cluster.engine.speculation import Bounds
from mlx_cluster.node.main import draft_bounds, draft_helper


def test_drafts_are_switched_off_where_they_could_not_be_taken_back() -> None:
    cuts, window = RowCost(10, 0, True), RowCost(10, 0, False)
    auto, off = SpeculationSection(max_draft=5), SpeculationSection(mode="off")
    assert draft_bounds(auto, [cuts, cuts]) == Bounds("auto", 5, 3)
    assert draft_bounds(auto, [cuts, window]) is None
    assert draft_bounds(off, [cuts]) is None
    assert draft_bounds(auto, []) is None


def test_a_draft_model_is_brought_only_where_drafts_are_tried() -> None:
    def helper(**values: object) -> object:
        return draft_helper(Settings(speculation=SpeculationSection(**values)), Path("target"), ())  # type: ignore[arg-type]

    assert helper(draft_model="demo") is not None
    assert helper() is None
    assert helper(draft_model="demo", mode="off") is None
