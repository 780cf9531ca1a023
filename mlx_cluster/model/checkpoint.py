"""A model directory, read without mlx: what is in it, what it weighs, whether it is whole.

Owns: validation, the manifest hash, and the cost in bytes of every layer, from safetensors headers alone.
Does not own: fetching (``model.hub``) and loading weights (``model.load``).
Invariant: nothing here reads tensor data, so it is quick on any size of model and safe in an agent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cluster.errors import CheckpointError
from mlx_cluster.model import families
from mlx_cluster.request import Pool

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format's own limit
_LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|transformer_layers)\.(\d+)\.")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "multi_modal", "mm_")
_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_QUANTIZATION_SIDE = (".scales", ".biases", ".qzeros", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header describes it. ``dtype`` is the safetensors name (``BF16`` …)."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes as stored, and as dense float32 (what a CPU stage holds after dequantizing)."""

    stored_bytes: int = 0
    dense_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.stored_bytes + other.stored_bytes, self.dense_bytes + other.dense_bytes)


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What a slice weighs. ``head`` includes the final norm; with ``tied`` it also needs the embedding's bytes."""

    layers: tuple[Cost, ...]
    embedding: Cost
    head: Cost
    tied: bool
    embedding_everywhere: bool

    def slice(self, start: int, end: int) -> Cost:
        """The cost of layers ``[start, end)`` with what their place in the pipeline adds."""
        first, last = start == 0, end == len(self.layers)
        total = sum(self.layers[start:end], Cost())
        if first or self.embedding_everywhere or (last and self.tied):
            total += self.embedding
        return total + self.head if last else total


def pooling(model_dir: Path) -> Pool | None:
    """How this checkpoint says that its states become embeddings, if it says so and we can do it."""
    try:
        said = json.loads((model_dir / "1_Pooling" / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    modes = {name for name, value in said.items() if name.startswith("pooling_mode_") and value is True}
    known: dict[str, Pool] = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
    return known.get(modes.pop()) if len(modes) == 1 else None


def load_config(model_dir: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises ``CheckpointError`` when it is missing or no JSON object."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: give the directory of an mlx-lm checkpoint, or download the model again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: download the model again")
    return config


def num_layers(model_dir: Path) -> int:
    return families.num_layers(load_config(model_dir))


def max_context(config: dict[str, Any]) -> int:
    """The number of positions that the model was made for."""
    return families.max_context(config)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that mlx-lm would load, in order. Raises ``CheckpointError`` when there are none."""
    files = sorted(model_dir.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"no model*.safetensors in {model_dir}: only safetensors weights are loaded; convert the model with "
            "mlx_lm.convert"
        )
    return files


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ``CheckpointError`` when the file is cut off or malformed."""
    return _parse_header(path, _header_bytes(path))


def tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name. Raises ``CheckpointError`` for a broken file."""
    found: dict[str, TensorInfo] = {}
    for path in weight_files(model_dir):
        for name, entry in read_header(path).items():
            begin, end = entry["data_offsets"]
            found[name] = TensorInfo(name, path.name, entry["dtype"], tuple(entry["shape"]), end - begin)
    return found


def validate(model_dir: Path) -> None:
    """Raise ``CheckpointError`` (or ``UnsupportedModel``) unless the directory holds a whole checkpoint.

    Looks at config.json, the tokenizer's files, the index and every weight file's header and length.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is no directory: give the directory of a checkpoint or a repository id")
    config = load_config(model_dir)
    families.family_of(config)
    families.num_layers(config)
    if config.get("model_file"):
        raise CheckpointError(
            f"{model_dir / 'config.json'} asks for its own Python code ({config['model_file']}), which is never run: "
            "choose a checkpoint of a family that mlx-lm knows"
        )
    has_tokenizer = any((model_dir / name).is_file() for name in _TOKENIZER_FILES) or any(model_dir.glob("*.tiktoken"))
    if not has_tokenizer:
        raise CheckpointError(f"{model_dir} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): download the model again")
    known = tensors(model_dir)
    _check_index(model_dir, known)


def manifest_hash(model_dir: Path) -> str:
    """A short stable digest of config.json and of names, sizes and headers of the weight files; never of paths."""
    digest = hashlib.sha256()
    config = {key: value for key, value in load_config(model_dir).items() if key != "_name_or_path"}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(model_dir):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        digest.update(_header_bytes(path))
    return digest.hexdigest()[:16]


def layer_costs(model_dir: Path) -> LayerCosts:
    """Bytes per layer, of the embedding and of the head, from headers alone."""
    config = load_config(model_dir)
    known = tensors(model_dir)
    layers = [Cost()] * families.num_layers(config)
    embedding, head = Cost(), Cost()
    tied = True
    for info in known.values():
        if any(word in info.name for word in _OTHER_TOWERS):
            continue  # mlx-lm drops the weights of other towers
        cost = Cost(info.num_bytes, _dense_bytes(info, known, config))
        place = _LAYER_NAME.search(info.name)
        if place is not None:
            if int(place[1]) < len(layers):  # beyond it: multi-token prediction layers, dropped as well
                layers[int(place[1])] += cost
        elif _is_embedding(info.name):
            embedding += cost
        else:
            tied = tied and not (len(info.shape) > 1 and _is_head(info.name))
            head += cost
    return LayerCosts(tuple(layers), embedding, head, tied, families.embedding_everywhere(config))


def kv_bytes_per_token(
    config: dict[str, Any], bytes_per_value: int = 4, *, kv_bits: int | None = None, kv_group_size: int = 64
) -> int:
    """Key and value bytes of one position in one attention layer; an upper bound for compressed attention.

    With ``kv_bits`` each group of values has so many bits for each and a scale and a bias of the plain size.
    """
    inner = families.text_config(config)
    heads = inner.get("num_attention_heads") or inner.get("n_head") or inner.get("n_heads") or 1
    kv_heads = inner.get("num_key_value_heads") or heads
    width = inner.get("hidden_size") or inner.get("n_embd") or inner.get("d_model") or 0
    head_dim = inner.get("head_dim") or width // heads
    values = 2 * int(kv_heads) * int(head_dim)
    if kv_bits is None:
        return values * bytes_per_value
    return values * kv_bits // 8 + values // kv_group_size * 2 * bytes_per_value


def resolve_local(model: str, model_dirs: Sequence[str | Path] = ()) -> Path:
    """The local directory of a model given as a directory or an id; looks into ``model_dirs`` and the hub's cache.

    Raises ``CheckpointError`` that lists where it looked.
    """
    direct = Path(model).expanduser()
    candidates = [direct]
    for folder in (*model_dirs, _hub_cache()):
        root = Path(folder).expanduser()
        candidates += [root / model, root / model.rpartition("/")[2]]
        snapshot = _hub_snapshot(root, model)
        if snapshot is not None:
            candidates.append(snapshot)
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate.resolve()
    looked = ", ".join(str(path) for path in dict.fromkeys(candidates))
    raise CheckpointError(
        f"model {model!r} is not on this machine (looked at {looked}): give its directory, add one to model_dirs, or "
        "let it be downloaded"
    )


def _header_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is cut off after {len(prefix)} bytes: download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is no safetensors file (header of {length} bytes): download it again")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from error
    if len(header) < length:
        raise CheckpointError(f"{path} is cut off inside its header: download it again")
    return header


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        data_bytes = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: download it again") from error
    expected, actual = 8 + len(header) + data_bytes, path.stat().st_size
    if actual < expected:
        raise CheckpointError(f"{path} has {actual} bytes, its header promises {expected}: download it again")
    return dict(entries)


def _check_index(model_dir: Path, known: Mapping[str, TensorInfo]) -> None:
    path = model_dir / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
        named = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): download the model again") from error
    for file in named:
        if not (model_dir / file).is_file():
            raise CheckpointError(f"{model_dir / file} is missing, though the index names it: download the model again")
    lost = next((name for name in weight_map if name not in known), None)
    if lost is not None:
        raise CheckpointError(f"tensor {lost} is in the index but not in {weight_map[lost]}: download the model again")


def _dense_bytes(info: TensorInfo, known: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> int:
    if info.name.endswith(_QUANTIZATION_SIDE):
        return 0
    elements = math.prod(info.shape)
    if info.dtype == "U32" and info.name.removesuffix(".weight") + ".scales" in known:
        return 4 * elements * 32 // _bits(info, known, config)
    if info.dtype == "I32" and info.name.endswith(".qweight"):
        return 4 * elements * 8  # AWQ and GPTQ pack eight values
    if info.dtype == "U8" and info.name.endswith(("_blocks", ".blocks")):
        return 4 * elements * 2  # mxfp4 packs two values
    return 4 * elements


def _bits(info: TensorInfo, known: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> int:
    path = info.name.removesuffix(".weight")
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    own = quantization.get(path)
    settings = {**quantization, **own} if isinstance(own, dict) else quantization
    group_size = int(settings.get("group_size", 64))
    values_per_row = known[f"{path}.scales"].shape[-1] * group_size
    return max(1, info.shape[-1] * 32 // max(1, values_per_row))


def _is_embedding(name: str) -> bool:
    words = ("embed", "wte", "wpe", "tok_", "word_emb")
    return any(word in name for word in words) and "embed_out" not in name and "norm" not in name


def _is_head(name: str) -> bool:
    return any(word in name for word in ("lm_head", "output", "embed_out", "head"))


def _hub_cache() -> Path:
    """Where huggingface_hub keeps snapshots; computed here because agents look without importing it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home) / "hub"


def _hub_snapshot(root: Path, model: str) -> Path | None:
    repository = root / f"models--{model.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return repository / "snapshots" / commit
