"""Loading a slice: only its own tensors, one at a time, cast and dequantized on the way.

Owns: the choice of device, precision and dequantizing, and the order in which weights are read.
Invariant: the peak is the slice plus one tensor. mlx-lm's lazy load reads a tensor when it is evaluated, so what is
never evaluated is never read.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import dequantize_model, load_model

from mlx_cluster.errors import CheckpointError, PlanError, UnsupportedModel
from mlx_cluster.model import checkpoint, families
from mlx_cluster.model.quantized_cache import KvFormat
from mlx_cluster.model.slice import ModelSlice

Device = Literal["auto", "cpu", "gpu"]
Dequantize = Literal["auto", "always", "never"]
Progress = Callable[[int, int], None]

# Without a budget, dense weights may take this share of the machine's memory.
_DEFAULT_BUDGET_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class LoadedSlice:
    """A slice whose weights are in memory. ``num_bytes`` is what they take."""

    slice: ModelSlice
    device: Literal["cpu", "gpu"]
    num_bytes: int


def load_slice(
    model_dir: Path,
    start: int,
    end: int,
    *,
    device: Device = "auto",
    dequantize: Dequantize = "auto",
    memory_budget_bytes: int | None = None,
    kv: KvFormat | None = None,
    known: dict[str, mx.array] | None = None,
    on_progress: Progress | None = None,
) -> LoadedSlice:
    """Load layers ``[start, end)``. Call it on the thread that will run the slice.

    On a CPU all floating weights become float32, because mlx has fast kernels for nothing else there, and quantized
    weights become dense when that fits (``auto``). On a GPU weights stay as they are stored.
    ``known`` are evaluated weights of another slice of this checkpoint by name: those that this one has too, in the
    same form, are not read again. The mapping is emptied, so that the rest is freed before anything is read.
    Raises ``CheckpointError``, ``UnsupportedModel``, ``PlanError``.
    """
    checkpoint.validate(model_dir)
    config = checkpoint.load_config(model_dir)
    families.check_slice(config, start, end)
    chosen = select_device(device)
    dense = _dequantizes(dequantize, chosen, checkpoint.layer_costs(model_dir).slice(start, end), memory_budget_bytes)
    model = _open(model_dir)
    if len(model.layers) != families.num_layers(config):
        raise UnsupportedModel(
            f"mlx-lm builds {len(model.layers)} layers where config.json names {families.num_layers(config)}, so a "
            "split by layer numbers would be wrong; choose a model of another family"
        )
    if chosen == "cpu":
        _cast_to_float32(model)
    if dense:
        dequantize_model(model)
    part = ModelSlice(model, start, end, kv)
    if known:
        _take_over(part, known)
    return LoadedSlice(part, chosen, _read(part, on_progress))


def select_device(device: Device) -> Literal["cpu", "gpu"]:
    """Make the device mlx's default: a GPU when there is one, unless told otherwise. Raises ``UnsupportedModel``."""
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    if device == "gpu" and not has_gpu:
        raise PlanError("runtime.device is gpu, but mlx finds none on this machine: use auto or cpu")
    chosen: Literal["cpu", "gpu"] = "gpu" if has_gpu and device != "cpu" else "cpu"
    mx.set_default_device(mx.gpu if chosen == "gpu" else mx.cpu)
    if chosen == "cpu" and sys.platform == "linux" and shutil.which("g++") is None:
        # mlx compiles fused operations with g++ at their first use and fails without it; unfused ones need none.
        # (MLX_DISABLE_COMPILE=1 in the environment does the same.)
        mx.disable_compile()
    return chosen


def _dequantizes(wish: Dequantize, device: str, cost: checkpoint.Cost, budget_bytes: int | None) -> bool:
    if wish != "auto":
        return wish == "always"
    if device != "cpu":
        return False
    if budget_bytes is None:
        budget_bytes = int(_DEFAULT_BUDGET_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return cost.dense_bytes <= budget_bytes


def _open(model_dir: Path) -> Any:
    """mlx-lm's model with weights that are read when they are evaluated."""
    try:
        model, _ = load_model(model_dir, lazy=True)
    except ValueError as error:
        kind = UnsupportedModel if "not supported" in str(error) else CheckpointError
        raise kind(f"mlx-lm cannot build the model in {model_dir}: {error}") from error
    except (RuntimeError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"the model in {model_dir} cannot be loaded ({type(error).__name__}: {error}): download it again"
        ) from error
    return model


def _cast_to_float32(model: Any) -> None:
    def cast(array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map(cast, model.parameters()))


def _take_over(part: ModelSlice, known: dict[str, mx.array]) -> None:
    """Put known weights in the place of those that have the same name, shape and type; empties ``known``."""
    same = [
        (name, known[name])
        for name, array in part.parameters_read().items()
        if name in known and (known[name].shape, known[name].dtype) == (array.shape, array.dtype)
    ]
    known.clear()
    part.model.load_weights(same, strict=False)
    mx.clear_cache()


def _read(part: ModelSlice, on_progress: Progress | None) -> int:
    """Evaluate the slice's weights one by one; returns their bytes. What a cast leaves behind is freed at once."""
    arrays = list(part.parameters_read().values())
    total, done = sum(array.nbytes for array in arrays), 0
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        if on_progress is not None:
            on_progress(done, total)
    mx.clear_cache()
    return total


def floating_dtype(part: ModelSlice) -> str:
    """The dtype of the slice's floating weights, for status and logs."""
    for _, array in tree_flatten(part.model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            return str(array.dtype).removeprefix("mlx.core.")
    return "none"
