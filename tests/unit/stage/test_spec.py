"""The lines between an agent and its stage process survive the way."""

from __future__ import annotations

import pytest

from mlx_cluster.plan import Epoch, ModelRef, Plan, StageAssignment
from mlx_cluster.stage.spec import DiskSpec, EmulationSpec, FaultSpec, LinkCommand, StageEvent, StageSpec

PLAN = Plan("p", 3, ModelRef("m", "abc", 4), (StageAssignment(0, 0, 0, 2), StageAssignment(1, 1, 2, 4)), "grpc", "why")


@pytest.mark.parametrize("emulation", [None, EmulationSpec(seconds_per_row=0.5)])
@pytest.mark.parametrize("faults", [None, FaultSpec(forget_stores=(0, 2))])
def test_a_spec(emulation: EmulationSpec | None, faults: FaultSpec | None) -> None:
    spec = StageSpec(
        PLAN,
        1,
        Epoch(3, 2),
        "/models/m",
        "127.0.0.1",
        8103,
        memory_budget_bytes=5,
        emulation=emulation,
        faults=faults,
        prefix_disk=DiskSpec("/var/prefixes", 7) if faults else None,
        kv_bits=8,
        compression="int8",
    )
    assert StageSpec.from_line(spec.to_line()) == spec


def test_a_link_command() -> None:
    command = LinkCommand("ring", ("a:1", "b:2"), ("10.0.0.1:5", "10.0.0.2:5"), 3.5)
    assert LinkCommand.from_line(command.to_line()) == command


def test_an_event() -> None:
    for event in (
        StageEvent("failed", code="checkpoint_error", message="no file\nhere"),
        StageEvent("loaded", address="a:1", memory_bytes=9, can_trim=True, kv_fixed_bytes=3, kv_bytes_per_position=512),
    ):
        assert "\n" not in event.to_line()
        assert StageEvent.from_line(event.to_line()) == event


@pytest.mark.parametrize("cls", [StageSpec, LinkCommand])
def test_a_line_of_another_type_is_refused(cls: type[StageSpec] | type[LinkCommand]) -> None:
    with pytest.raises(ValueError, match=r"spec|link"):
        cls.from_line('{"type": "tick"}')
