"""What a node says of itself in every heartbeat: frozen values with their JSON form.

Owns: ``NodeStatus`` and its parts. Does not own: whether the node is alive (``membership``).
Invariant: ``NodeStatus.from_json(status.to_json()) == status``; unknown keys are errors, because all nodes run the
same version.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_cluster.plan import Epoch, Plan

StageState = Literal["starting", "loading", "loaded", "linking", "linked", "failed"]
PipelineState = Literal["loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model that this node can load from its own disk, and what its parts weigh.

    ``layer_bytes`` has one entry per layer; ``embed_bytes`` rests on the first stage (with ``tied`` on the last one
    too, with ``embedding_everywhere`` on all), ``head_bytes`` (final norm and head) on the last one. ``legal_cuts`` are
    the layers at which a stage may start. ``kv_bytes_per_token`` is for one layer.
    ``dense_ratio`` says how much more the weights take in this node's memory than on its disk, ``least_ratio`` the same
    when memory is short and quantized weights stay packed.
    """

    id: str
    manifest_hash: str
    layer_bytes: tuple[int, ...]
    embed_bytes: int = 0
    head_bytes: int = 0
    kv_bytes_per_token: int = 0
    max_context: int = 0
    dense_ratio: float = 1.0
    least_ratio: float = 1.0
    tied: bool = False
    embedding_everywhere: bool = False
    legal_cuts: tuple[int, ...] | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)


@dataclass(frozen=True, slots=True)
class StageStatus:
    """A stage process of this node."""

    pipeline: str
    epoch: Epoch
    index: int
    start: int
    end: int
    pid: int
    state: StageState
    memory_bytes: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    detail: str = ""
    compression: str = "off"  # of the hidden states that it sends


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    """A pipeline that this node drives: it holds stage 0 and the engine. ``plan`` carries the transport in use.

    ``running`` counts its sequences, waiting ones too; ``step_seconds`` is what a decode step took each stage in the
    mean, over the same steps (empty until enough were seen). ``sent_bytes_per_second`` is what each stage's link to the
    next one carried in the last seconds (empty until measured). ``lost`` is why the last epoch of this plan that was
    ready is so no more ("" if none was): who missed the beat between the two epochs still learns it.
    """

    plan: Plan
    epoch: Epoch
    state: PipelineState
    detail: str = ""
    running: int = 0
    step_seconds: tuple[float, ...] = ()
    sent_bytes_per_second: tuple[float, ...] = ()
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Recovery:
    """A pipeline was lost and serves again. ``at`` is when it did, in Unix seconds."""

    pipeline: str
    epoch: str
    cause: str
    seconds: float
    at: float


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """Everything a node tells the others. ``sequence`` rises with every status of one boot.

    ``document`` is the (era, term, version) of the newest cluster document this node has accepted and ``document_hash``
    its digest; ``leader`` and ``term`` are whom it takes for the coordinator; ``unplaced`` (model, why) is filled by
    the coordinator only. ``memory_free_bytes`` is what its own budget leaves of ``machine_free_bytes``, which it may
    share with other nodes (None: its budget is the whole machine). ``voter`` is its id in the election, ``founded``
    whether it knows a founded cluster, ``backs`` the voter that it would have found one. ``health`` and ``load`` are in
    0…1. ``leaving``: this is its last word.
    """

    node_id: int
    name: str
    pid: int
    host: str
    machine: str
    boot_id: str
    sequence: int
    version: str
    gateway_url: str
    admin_url: str
    comms_address: str
    memory_total_bytes: int
    memory_free_bytes: int
    cores: int
    transports: tuple[str, ...] = ("grpc", "ring")  # kinds of links that this machine can bring up
    mpi: tuple[int, int] | None = None  # (rank, size) when mpirun started this agent
    leader: int | None = None
    term: int = 0
    document: tuple[int, int, int] = (0, 0, 0)
    document_hash: str = ""
    models: tuple[ModelFacts, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()  # (model, why this node cannot load it)
    stages: tuple[StageStatus, ...] = ()
    pipelines: tuple[PipelineStatus, ...] = ()
    epochs: tuple[tuple[str, Epoch], ...] = ()  # the highest epoch seen of each pipeline
    unplaced: tuple[tuple[str, str], ...] = ()
    voter: str = ""
    founded: bool = False
    backs: str = ""
    health: float = 1.0
    load: float = 0.0
    leaving: bool = False
    speed_bytes_per_second: float = 0.0  # of weights read, measured at join; 0: not known
    draining: bool = False  # it still works, but wants to leave: nothing new is placed here, and what is here moves
    recoveries: tuple[Recovery, ...] = ()  # the latest of the pipelines that this node drives
    round_trips: tuple[tuple[int, float], ...] = ()  # (node, seconds) to the others, as far as they answer
    machine_free_bytes: int | None = None

    def model(self, model_id: str) -> ModelFacts | None:
        return next((facts for facts in self.models if facts.id == model_id), None)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for stage, value in zip(data["stages"], self.stages, strict=True):
            stage["epoch"] = str(value.epoch)
        data["pipelines"] = [
            {
                "plan": p.plan.to_json(),
                "epoch": str(p.epoch),
                "state": p.state,
                "detail": p.detail,
                "running": p.running,
                "step_seconds": list(p.step_seconds),
                "sent_bytes_per_second": list(p.sent_bytes_per_second),
                "lost": p.lost,
            }
            for p in self.pipelines
        ]
        data["epochs"] = [[pipeline, str(epoch)] for pipeline, epoch in self.epochs]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NodeStatus:
        """Inverse of ``to_json``. Raises ``TypeError``, ``KeyError`` or ``ValueError`` on anything else."""
        data = dict(data)
        era, term, version = data.pop("document")
        mpi = data.pop("mpi")
        return cls(
            document=(era, term, version),
            mpi=(mpi[0], mpi[1]) if mpi is not None else None,
            transports=tuple(data.pop("transports")),
            models=tuple(_facts_from_json(facts) for facts in data.pop("models")),
            missing=tuple((model, why) for model, why in data.pop("missing")),
            stages=tuple(
                StageStatus(**{**stage, "epoch": Epoch.parse(stage["epoch"])}) for stage in data.pop("stages")
            ),
            pipelines=tuple(
                PipelineStatus(
                    Plan.from_json(p["plan"]),
                    Epoch.parse(p["epoch"]),
                    p["state"],
                    p["detail"],
                    p["running"],
                    tuple(p["step_seconds"]),
                    tuple(p["sent_bytes_per_second"]),
                    p["lost"],
                )
                for p in data.pop("pipelines")
            ),
            epochs=tuple((pipeline, Epoch.parse(epoch)) for pipeline, epoch in data.pop("epochs")),
            unplaced=tuple((model, why) for model, why in data.pop("unplaced")),
            round_trips=tuple((node_id, seconds) for node_id, seconds in data.pop("round_trips")),
            recoveries=tuple(Recovery(**recovery) for recovery in data.pop("recoveries")),
            **data,
        )


def _facts_from_json(data: dict[str, Any]) -> ModelFacts:
    cuts = data.pop("legal_cuts")
    layers = tuple(data.pop("layer_bytes"))
    return ModelFacts(**data, layer_bytes=layers, legal_cuts=None if cuts is None else tuple(cuts))
