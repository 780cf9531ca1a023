"""The process of a small model that drafts for an engine of this node (``speculation.draft_model``).

Owns: finding the model, the check that it speaks the same tokens, and the life of its process: a stage process with all
layers. Does not own: what it drafts (``engine.draft_model``).
Invariant: the process ends with its engine; when it cannot start, or dies, the engine goes on without it and says so.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from mlx_cluster import demo, log
from mlx_cluster.config.schema import RuntimeSection
from mlx_cluster.engine.engine import PipelineEngine
from mlx_cluster.errors import CheckpointError, ClusterError, StageLost, UnsupportedModel
from mlx_cluster.model import checkpoint
from mlx_cluster.plan import ModelRef, Plan, StageAssignment
from mlx_cluster.stage.process import StageProcess
from mlx_cluster.stage.spec import LinkCommand, StageSpec

_log = log.get("node.draft")


def drafting(
    wanted: str, target: Path, folders: tuple[str, ...], runtime: RuntimeSection
) -> Callable[[PipelineEngine], Coroutine[Any, Any, None]]:
    """What an engine runs beside itself: the process of the draft model ``wanted``, until it is cancelled."""

    async def run(engine: PipelineEngine) -> None:
        try:
            directory = await asyncio.to_thread(find, wanted, target, folders)
            await _serve(engine, directory, runtime)
        except ClusterError as error:
            engine.drafts_unavailable(str(error))

    return run


def find(wanted: str, target: Path, folders: tuple[str, ...]) -> Path:
    """The draft model's directory. Raises ``CheckpointError`` when it is not here or has another vocabulary."""
    directory = demo.model_dir() if wanted == demo.MODEL_NAME else checkpoint.resolve_local(wanted, folders)
    checkpoint.validate(directory)
    check_vocabulary(directory, target)
    return directory


def check_vocabulary(draft: Path, target: Path) -> None:
    """Raises ``CheckpointError`` unless every id means the same to both models."""
    mine, theirs = _vocabulary(draft), _vocabulary(target)
    different = next((token for token in sorted(mine.keys() | theirs) if mine.get(token) != theirs.get(token)), None)
    if different is not None:
        raise CheckpointError(
            f"speculation.draft_model {draft} has another vocabulary than {target}: {different!r} is token "
            f"{mine.get(different)} there and {theirs.get(different)} here; take a small model of the same family"
        )


def _vocabulary(directory: Path) -> Mapping[str, int]:
    path = directory / "tokenizer.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        listed = values["model"]["vocab"]
        tokens = dict(listed) if isinstance(listed, dict) else {piece[0]: at for at, piece in enumerate(listed)}
        return tokens | {added["content"]: added["id"] for added in values.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be compared: {error}; a draft model needs one on both sides") from error


async def _serve(engine: PipelineEngine, directory: Path, runtime: RuntimeSection) -> None:
    num_layers = len(checkpoint.layer_costs(directory).layers)
    plan = Plan(
        f"{engine.plan.pipeline}-draft",
        engine.plan.version,
        ModelRef(directory.name, checkpoint.manifest_hash(directory), num_layers),
        (StageAssignment(0, engine.plan.engine_node_id, 0, num_layers),),
        "grpc",
    )
    spec = StageSpec(
        plan,
        0,
        engine.epoch,
        str(directory),
        "127.0.0.1",
        0,
        device=runtime.device,
        dequantize=runtime.dequantize,
    )
    ended = asyncio.Event()
    process = await StageProcess.start(spec, runtime, on_exit=lambda _reason: ended.set())
    try:
        loaded = await process.loaded()
        if not loaded.can_trim:
            raise UnsupportedModel(
                f"speculation.draft_model {directory} remembers more than keys and values: a wrong guess cannot be "
                "taken back; choose a model without sliding windows or recurrent layers"
            )
        await process.link(LinkCommand("grpc", (loaded.address,)))
        await engine.attach_drafts(loaded.address, plan, engine.epoch)
        _log.info("the draft model is ready", model=str(directory), pid=process.pid)
        await ended.wait()
        raise StageLost(f"the process of the draft model {directory} has ended")
    finally:
        await process.stop()
