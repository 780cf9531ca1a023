"""What fewer bits cost in quality: perplexity with quantized keys and values, and with compressed links.

    python benchmarks/quality.py --json quality.json

The model is cut as a pipeline would be and given text in chunks, each behind the one before in the same caches; every
next token's probability is read from the last slice. Hidden states go from slice to slice as frames, compressed and
expanded by the codec of the links. Two texts: documentation strings of Python's standard library, which the demo model
has never seen, and its own lessons, which it knows by heart. "Same choice" is the share of positions where the most
probable token is the one of the first line. Nothing here depends on the machine's speed, save --codec.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import pkgutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mlx.core as mx
import numpy as np

from benchmarks import record
from mlx_cluster import demo
from mlx_cluster.microbatch import Frame, TensorSpec
from mlx_cluster.model import cache as row_cache
from mlx_cluster.model import state
from mlx_cluster.model.load import load_slice
from mlx_cluster.model.quantized_cache import KvFormat
from mlx_cluster.model.slice import ModelSlice
from mlx_cluster.plan import ranges_from_counts
from mlx_cluster.tokenizer import tokenizer as text_side
from mlx_cluster.transport import compression, framing

MODULES = ("argparse", "asyncio", "csv", "decimal", "email", "json", "random", "socket", "statistics", "threading")
NDArrayInt = np.ndarray[Any, np.dtype[Any]]
CODEC_FRAMES = {"one row of a 7B model": (1, 1, 3584), "its 512-token chunk": (1, 512, 3584)}


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    kv: KvFormat | None = None
    compressed: bool = False


SETTINGS = (
    Setting("as it is"),
    Setting("kv_bits 8", KvFormat(8, 64)),
    Setting("kv_bits 4", KvFormat(4, 64)),
    Setting("kv_bits 4, groups of 32", KvFormat(4, 32)),
    Setting("links int8", compressed=True),
    Setting("kv_bits 8, links int8", KvFormat(8, 64), compressed=True),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One setting on one text."""

    setting: str
    text: str
    tokens: int
    perplexity: float
    change_percent: float
    same_choice_percent: float
    kv_bytes_per_position: int
    hop_bytes_per_position: float


class Chain:
    """The slices of a pipeline, one behind the other on this thread."""

    def __init__(self, model_dir: Path, counts: Sequence[int], setting: Setting) -> None:
        ranges = ranges_from_counts(list(counts), sum(counts))
        self.slices: list[ModelSlice] = [load_slice(model_dir, a, b, kv=setting.kv).slice for a, b in ranges]
        self._compressed = setting.compressed
        self.hop_bytes = self.positions = 0

    def read(self, tokens: Sequence[int], chunk: int) -> mx.array:
        """Logits (positions, vocabulary) behind each token."""
        caches = [part.make_caches() for part in self.slices]
        lines = []
        for at in range(0, len(tokens), chunk):
            ids = mx.array([list(tokens[at : at + chunk])])
            hidden: list[mx.array] = []
            for part, mine in zip(self.slices, caches, strict=True):
                hidden = part(ids, hidden, mine, head="all")
                mx.eval(hidden, row_cache.states(mine))
                if not part.last:
                    hidden = self._across(hidden, ids.shape[1])
            lines.append(hidden[0][0])
        return mx.concatenate(lines)

    def _across(self, hidden: Sequence[mx.array], positions: int) -> list[mx.array]:
        frame = state.pack(0, hidden)
        mx.eval(frame.payload)
        if self._compressed:
            frame = compression.compress(frame)
        self.hop_bytes += framing.num_bytes(frame.tensors)
        self.positions += positions
        return state.unpack(compression.expand(frame))

    @property
    def kv_bytes_per_position(self) -> int:
        total = 0
        for part in self.slices:
            caches = part.make_caches()
            part(mx.zeros((1, 2), mx.int32), part.stand_ins(1, 2), caches, head="none")
            total += row_cache.cost(caches).bytes_per_position
        return total


def held_out() -> str:
    """What Python says of parts of itself."""

    def documented() -> Iterator[str]:
        for name in MODULES:
            module = import_module(name)
            yield inspect.getdoc(module) or ""
            for _, member in inspect.getmembers(module, lambda m: inspect.isclass(m) or inspect.isfunction(m)):
                yield inspect.getdoc(member) or ""

    return "\n\n".join(text for text in documented() if len(text) > 200)


def lessons(tokenizer: text_side.Tokenizer) -> list[Sequence[int]]:
    """Questions of the demo model's corpus with their answers, as chats."""
    data = pkgutil.get_data("mlx_cluster.demo", "corpus/examples.json")
    assert data is not None
    return [
        (
            *tokenizer.render_chat([{"role": "user", "content": pair["question"]}]),
            *tokenizer.encode(pair["answer"], add_special_tokens=False),
        )
        for pair in json.loads(data)
    ]


def measure(
    chain: Chain, windows: Sequence[Sequence[int]], chunk: int, choices: list[NDArrayInt] | None
) -> tuple[float, float, list[NDArrayInt]]:
    """Perplexity, share of the same choices, and the choices."""
    loss, count, same = 0.0, 0, 0
    mine: list[NDArrayInt] = []
    for index, window in enumerate(windows):
        logits = chain.read(window[:-1], chunk).astype(mx.float32)
        targets = mx.array(list(window[1:]))
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        mine.append(np.array(mx.argmax(logits, axis=-1)))
        loss += float(losses.sum().item())  # type: ignore[arg-type]
        count += len(window) - 1
        same += int((mine[-1] == (choices or mine)[index]).sum())
    return math.exp(loss / count), 100 * same / count, mine


def windows_of(tokens: Sequence[int], num_tokens: int, length: int) -> list[Sequence[int]]:
    """Windows of equal length, each with one token more to be guessed."""
    taken = tokens[:num_tokens]
    return [taken[at : at + length + 1] for at in range(0, len(taken) - length, length)]


def codec_milliseconds(repeat: int) -> dict[str, dict[str, float]]:
    """How long the codec takes for one frame of bfloat16, on this machine as it is now."""
    taken = {}
    for name, shape in CODEC_FRAMES.items():
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        payload = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        frame = Frame(0, (TensorSpec("bfloat16", shape),), payload)
        sent = compression.compress(frame)
        taken[name] = {
            "bytes": len(payload),
            "compressed_bytes": framing.num_bytes(sent.tensors),
            "compress_ms": _median_ms(lambda frame=frame: compression.compress(frame), repeat),  # type: ignore[misc]
            "expand_ms": _median_ms(lambda sent=sent: compression.expand(sent), repeat),  # type: ignore[misc]
        }
    return taken


def _median_ms(work: Any, repeat: int) -> float:
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(seconds), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(demo.model_dir()))
    parser.add_argument("--split", default="10/9/9", help="layers of each stage")
    parser.add_argument("--tokens", type=int, default=4096, help="of the held-out text at most")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--codec", type=int, default=0, metavar="N", help="also time the codec, N times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer = text_side.load(options.model)
    texts = {
        "held-out text": windows_of(tokenizer.encode(held_out()), options.tokens, options.window),
        "its own lessons": lessons(tokenizer),
    }
    counts = [int(layers) for layers in options.split.split("/")]
    lines: list[Line] = []
    first: dict[str, tuple[float, list[NDArrayInt]]] = {}
    for setting in SETTINGS:
        for name, windows in texts.items():
            chain = Chain(options.model, counts, setting)
            reference = first.get(name)
            perplexity, same, choices = measure(chain, windows, options.chunk, reference[1] if reference else None)
            before = first.setdefault(name, (perplexity, choices))[0]
            line = Line(
                setting.name,
                name,
                sum(len(window) - 1 for window in windows),
                round(perplexity, 4),
                round(100 * (perplexity / before - 1), 3),
                round(same, 2),
                chain.kv_bytes_per_position,
                round(chain.hop_bytes / chain.positions, 1),
            )
            lines.append(line)
            print(json.dumps(asdict(line)), flush=True)
    results: dict[str, Any] = {"lines": [asdict(line) for line in lines]}
    if options.codec:
        results["codec"] = codec_milliseconds(options.codec)
        print(json.dumps(results["codec"]))
    record.save(options.json, "quality", results)


if __name__ == "__main__":
    main()
