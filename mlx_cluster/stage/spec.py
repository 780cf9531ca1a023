"""What an agent tells its stage process, and what it hears back: JSON lines over the child's stdin and stdout.

Owns: the values of that conversation, and which spec a process can go over to without a restart. The first line in is
a ``StageSpec``; then ``LinkCommand``, and a ``tick`` every second (its absence means the agent is gone or frozen, and
the stage process dies by itself). A further ``StageSpec`` begins another epoch in the same process. Lines out are
``StageEvent`` values.
Invariant: everything on these pipes is one JSON object per line with a ``type``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlx_cluster.plan import Epoch, Plan

# A stage process that hears nothing from its agent for this long is killed by its own kernel timer.
AGENT_SILENCE_SECONDS = 8
TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EmulationSpec:
    """A stage that sleeps instead of computing: stands in for an accelerator-bound machine.

    A decode step of ``b`` rows takes ``seconds_per_step + b * seconds_per_row``, and so does a verification block of
    ``b`` positions; with ``rows_per_step`` the first part counts once for each so many rows begun. A chunk of ``l``
    tokens behind ``p`` others takes ``seconds_per_step + l * seconds_per_prompt_token`` and, for its attention,
    ``(l² + 2pl) * seconds_per_prompt_square``.
    ``burn_python_seconds`` of it hold the GIL, as building a real graph does. Hidden states are bfloat16 of width
    ``hidden_size``; the last stage's tokens lie in ``first_token_id … first_token_id + num_token_ids - 1`` (printable
    characters of a byte-level vocabulary) and begin again after ``repeat_after`` of them, if that is not 0: a text that
    drafts can guess.
    """

    seconds_per_row: float = 0.0
    seconds_per_step: float = 0.0
    seconds_per_prompt_token: float = 0.0
    seconds_per_prompt_square: float = 0.0
    rows_per_step: int = 0
    burn_python_seconds: float = 0.0
    hidden_size: int = 3584
    first_token_id: int = 32
    num_token_ids: int = 90
    repeat_after: int = 0


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """Where a stage keeps entries of the prefix cache over a restart, and how many bytes of them."""

    path: str
    max_bytes: int


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """What a test has one stage do wrong. ``forget_stores``: which of its stores it forgets at once, counted from 0."""

    forget_stores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageSpec:
    """Everything a stage process needs to load its slice. ``model_dir`` is this node's own path.

    With ``keep`` the process outlives its epoch: when that is over, and not by its own fault, it keeps its weights and
    waits for the spec of the next one.
    """

    plan: Plan
    index: int
    epoch: Epoch
    model_dir: str
    host: str
    port: int  # gRPC port of the stage process; 0 lets the system choose, the ``loaded`` event tells
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dequantize: Literal["auto", "always", "never"] = "auto"
    memory_budget_bytes: int | None = None
    link_timeout_seconds: float = 30.0
    log_level: str = "info"
    emulation: EmulationSpec | None = None
    faults: FaultSpec | None = None
    prefix_disk: DiskSpec | None = None
    kv_bits: Literal[4, 8] | None = None
    kv_group_size: int = 64
    compression: Literal["off", "int8"] = "off"  # of what it sends
    keep: bool = False

    @property
    def layers(self) -> tuple[int, int]:
        """``[start, end)`` of this stage."""
        stage = self.plan.stages[self.index]
        return stage.start, stage.end

    def can_become(self, other: StageSpec) -> bool:
        """Whether a process of this spec may go over to ``other``: the same weights in the same form, a newer epoch.

        Layers may differ: what both have stays, the rest is loaded.
        """
        return self.keep and other.keep and self.epoch < other.epoch and self._loading() == other._loading()

    def num_kept_layers(self, other: StageSpec) -> int:
        """How many layers both of them have."""
        (start, end), (other_start, other_end) = self.layers, other.layers
        return max(0, min(end, other_end) - max(start, other_start))

    def _loading(self) -> tuple[object, ...]:
        """All that loading depends on beside the layers."""
        form = self.device, self.dequantize, self.kv_bits, self.kv_group_size
        return self.plan.model, self.model_dir, self.host, form, self.emulation, self.faults, self.prefix_disk

    def to_line(self) -> str:
        data = {
            "type": "spec",
            "plan": self.plan.to_json(),
            "index": self.index,
            "epoch": str(self.epoch),
            "model_dir": self.model_dir,
            "host": self.host,
            "port": self.port,
            "device": self.device,
            "dequantize": self.dequantize,
            "memory_budget_bytes": self.memory_budget_bytes,
            "link_timeout_seconds": self.link_timeout_seconds,
            "log_level": self.log_level,
            "emulation": asdict(self.emulation) if self.emulation else None,
            "faults": asdict(self.faults) if self.faults else None,
            "prefix_disk": asdict(self.prefix_disk) if self.prefix_disk else None,
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "compression": self.compression,
            "keep": self.keep,
        }
        return json.dumps(data)

    @classmethod
    def from_line(cls, line: str) -> StageSpec:
        data: dict[str, Any] = json.loads(line)
        if data.pop("type", None) != "spec":
            raise ValueError("the first line on a stage's stdin must be its spec")
        emulation, faults = data.pop("emulation"), data.pop("faults")
        disk = data.pop("prefix_disk")
        return cls(
            plan=Plan.from_json(data.pop("plan")),
            epoch=Epoch.parse(data.pop("epoch")),
            emulation=EmulationSpec(**emulation) if emulation else None,
            faults=FaultSpec(tuple(faults["forget_stores"])) if faults else None,
            prefix_disk=DiskSpec(**disk) if disk else None,
            **data,
        )


@dataclass(frozen=True, slots=True)
class LinkCommand:
    """Bring up the links of this epoch. Both lists are ordered by stage index.

    ``stage_addresses`` are host:port of the stage processes' gRPC servers; ``mlx_addresses`` ip:port for the ring.
    """

    transport: str
    stage_addresses: tuple[str, ...]
    mlx_addresses: tuple[str, ...] = ()
    timeout_seconds: float = 25.0
    type: str = field(default="link", init=False)

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> LinkCommand:
        data: dict[str, Any] = json.loads(line)
        if data.pop("type", None) != "link":
            raise ValueError(f"not a link command: {line[:100]!r}")
        return cls(
            transport=data["transport"],
            stage_addresses=tuple(data["stage_addresses"]),
            mlx_addresses=tuple(data["mlx_addresses"]),
            timeout_seconds=data["timeout_seconds"],
        )


TICK_LINE = json.dumps({"type": "tick"})


def parse_command(line: str) -> StageSpec | LinkCommand:
    """A line to a stage process that is loaded. Raises ``ValueError`` on anything else."""
    return StageSpec.from_line(line) if json.loads(line).get("type") == "spec" else LinkCommand.from_line(line)


@dataclass(frozen=True, slots=True)
class StageEvent:
    """``loading`` (done/total bytes), ``loaded`` (address, memory, rows), ``linked``, ``failed`` (code, message).

    ``ended`` (code, message): the epoch is over, the process keeps its weights. ``adopted``: nothing of the epoch
    before is left, nor on the device; what follows is said in the new one.
    ``can_trim`` says whether a row may begin with a part of a prefix entry (else only with the whole); a row takes
    ``kv_fixed_bytes`` and, for each of its positions, ``kv_bytes_per_position``.
    """

    type: Literal["loading", "loaded", "linked", "failed", "ended", "adopted"]
    done_bytes: int = 0
    total_bytes: int = 0
    address: str = ""
    memory_bytes: int = 0
    can_trim: bool = False
    kv_fixed_bytes: int = 0
    kv_bytes_per_position: int = 0
    code: str = ""
    message: str = ""

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> StageEvent:
        return cls(**json.loads(line))
