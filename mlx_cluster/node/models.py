"""The configured models as this node's own disk knows them.

Owns: the way from a model's id to this node's directory, and its facts (manifest hash, weights of its layers).
Does not own: the checkpoint's format (``model.checkpoint``), who holds which layers.
Invariant: paths never leave the node; the cluster speaks of ids and manifest hashes. mlx is not imported here.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_cluster import demo, log
from mlx_cluster.cluster.status import ModelFacts
from mlx_cluster.config.names import settings_of_node
from mlx_cluster.config.schema import ModelEntry, NodeEntry, Settings
from mlx_cluster.errors import CheckpointError, ClusterError
from mlx_cluster.model import checkpoint, families
from mlx_cluster.node import machine
from mlx_cluster.plan import Plan
from mlx_cluster.request import Pool

# A model made for a million positions must not be refused because a million positions do not fit.
DEFAULT_MAX_CONTEXT = 32_768

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class LocalModel:
    directory: Path
    facts: ModelFacts
    created: int  # seconds since 1970, for /v1/models
    pooling: Pool | None = None  # of a checkpoint that says it gives embeddings


class LocalModels:
    """``refresh`` looks at the disk, in a thread; everything else answers from what it found.

    ``copies`` is the folder of models that were copied from peers; it is looked at last.
    """

    def __init__(self, settings: Settings, entry: NodeEntry, copies: Path | None = None) -> None:
        self._copies = copies
        self._notes: dict[str, str] = {}
        self._entries: Mapping[str, ModelEntry] = settings.models
        self._folders = settings_of_node(settings, entry).model_dirs
        self._runtime = settings.runtime
        self._device = settings.runtime.device
        self._dequantize = settings.runtime.dequantize
        self._found: dict[str, LocalModel] = {}
        self._missing: dict[str, str] = {}

    @property
    def folders(self) -> tuple[str, ...]:
        """Where this node's settings say that models lie."""
        return tuple(self._folders)

    @property
    def facts(self) -> tuple[ModelFacts, ...]:
        return tuple(model.facts for model in self._found.values())

    @property
    def missing(self) -> tuple[tuple[str, str], ...]:
        return tuple((model_id, self._notes.get(model_id) or why) for model_id, why in self._missing.items())

    def note(self, model_id: str, text: str) -> None:
        """What is being done about a missing model, for ``missing``; "" takes it back."""
        self._notes[model_id] = text

    def copy_of(self, model_id: str) -> Path:
        """Where a copy of this model from a peer belongs."""
        assert self._copies is not None, "this node was given no folder for copies"
        return self._copies / f"{re.sub('[^A-Za-z0-9._-]', '-', model_id)}-{_short_hash(model_id)}"

    def get(self, model_id: str) -> LocalModel | None:
        return self._found.get(model_id)

    def directory_for(self, plan: Plan) -> Path:
        """This node's directory of the plan's model. Raises ``CheckpointError`` when it is not that very model."""
        model = self._found.get(plan.model.id)
        if model is None:
            why = self._missing.get(plan.model.id, "it is not configured here")
            raise CheckpointError(f"this node cannot load {plan.model.id}: {why}")
        if model.facts.manifest_hash != plan.model.manifest_hash:
            raise CheckpointError(
                f"{plan.model.id} in {model.directory} has manifest {model.facts.manifest_hash}, the plan wants "
                f"{plan.model.manifest_hash}: copy the same checkpoint to every node"
            )
        return model.directory

    async def refresh(self) -> bool:
        """Look for models that are still missing; True when one was found."""
        wanted = {model_id: entry for model_id, entry in self._entries.items() if model_id not in self._found}
        if not wanted:
            return False
        before = len(self._found)
        for model_id, entry in wanted.items():
            try:
                self._found[model_id] = await asyncio.to_thread(self._look, model_id, entry)
                self._missing.pop(model_id, None)
            except ClusterError as error:
                if self._missing.get(model_id) != str(error):
                    _log.warning("model not found", model=model_id, reason=str(error))
                self._missing[model_id] = str(error)
        return len(self._found) > before

    def _look(self, model_id: str, entry: ModelEntry) -> LocalModel:
        wanted = entry.path or model_id
        is_demo = wanted == demo.MODEL_NAME
        directory = demo.model_dir() if is_demo else self._resolve(model_id, wanted)
        checkpoint.validate(directory)
        config = checkpoint.load_config(directory)
        costs = checkpoint.layer_costs(directory)
        if entry.total_layers is not None and entry.total_layers != len(costs.layers):
            raise CheckpointError(
                f"{directory} has {len(costs.layers)} layers, models.{model_id}.total_layers says {entry.total_layers}"
            )
        known = checkpoint.max_context(config)
        dense, least = self._ratios(costs, quantized="quantization" in config or "quantization_config" in config)
        cuts = families.legal_cuts(config)
        facts = ModelFacts(
            id=model_id,
            manifest_hash=checkpoint.manifest_hash(directory),
            layer_bytes=tuple(cost.stored_bytes for cost in costs.layers),
            embed_bytes=costs.embedding.stored_bytes,
            head_bytes=costs.head.stored_bytes,
            kv_bytes_per_token=checkpoint.kv_bytes_per_token(
                config, kv_bits=self._runtime.kv_bits, kv_group_size=self._runtime.kv_group_size
            ),
            max_context=min(entry.max_context, known) if entry.max_context else min(known, DEFAULT_MAX_CONTEXT),
            dense_ratio=dense,
            least_ratio=least,
            tied=costs.tied,
            embedding_everywhere=costs.embedding_everywhere,
            legal_cuts=tuple(cuts) if len(cuts) < len(costs.layers) - 1 else None,
        )
        created = int((directory / "config.json").stat().st_mtime)
        return LocalModel(directory, facts, created, checkpoint.pooling(directory))

    def _resolve(self, model_id: str, wanted: str) -> Path:
        try:
            return checkpoint.resolve_local(wanted, self._folders)
        except CheckpointError:
            if self._copies is not None and (copy := self.copy_of(model_id)).is_dir():
                return copy
            raise

    def _ratios(self, costs: checkpoint.LayerCosts, *, quantized: bool) -> tuple[float, float]:
        """How much more the weights take in memory than on disk: as this node prefers it, and at least.

        On a CPU floating weights become float32 and quantized ones dense where that fits; see ``model.load``.
        """
        whole = costs.slice(0, len(costs.layers))
        grown = whole.dense_bytes / max(1, whole.stored_bytes)
        if self._dequantize == "always":
            return grown, grown
        on_cpu = self._device == "cpu" or (self._device == "auto" and not machine.has_gpu())
        if not on_cpu:
            return 1.0, 1.0
        if quantized:
            return (1.0 if self._dequantize == "never" else grown), 1.0
        return grown, grown


def _short_hash(text: str) -> str:
    """So that two ids that differ only in characters no file name has do not share a folder."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
