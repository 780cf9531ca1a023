"""Loading a slice: only its own bytes, in the right precision, without a peak; and reading from another thread."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_cluster.errors import CheckpointError, PlanError, UnsupportedModel
from mlx_cluster.microbatch import Kind, Microbatch, Outcome, RowSpec
from mlx_cluster.model import checkpoint
from mlx_cluster.model.load import load_slice
from mlx_cluster.model.runner import SliceRunner
from mlx_cluster.request import Sampling
from tests.tiny_models import tiny_config, write_tiny_model


@pytest.mark.parametrize("family", ["qwen2", "qwen2/untied", "gemma4_text", "deepseek_v3"])
def test_a_slice_reads_what_its_costs_promise(tmp_path: Path, family: str) -> None:
    """Placement plans with header arithmetic; the graph decides what is read: both must agree."""
    model_dir = write_tiny_model(tmp_path / "m", layers=6, width=64, vocab=320, family=family)
    costs = checkpoint.layer_costs(model_dir)
    for start, end in ((0, 2), (2, 6), (1, 2), (0, 6)):
        loaded = load_slice(model_dir, start, end, device="cpu")
        assert loaded.num_bytes == sum(array.nbytes for array in loaded.slice.parameters_read().values())
        planned = costs.slice(start, end).stored_bytes
        # gemma4 has a final projection per layer that headers cannot place; nothing else may differ.
        assert loaded.num_bytes == planned or (family == "gemma4_text" and loaded.num_bytes <= 1.2 * planned)


def test_progress_ends_at_the_slices_bytes(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=4, width=32, vocab=300)
    seen: list[tuple[int, int]] = []
    loaded = load_slice(model_dir, 1, 3, device="cpu", on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (loaded.num_bytes, loaded.num_bytes)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("dequantize", "budget_bytes", "dense"),
    [("always", 0, True), ("never", None, False), ("auto", 10**9, True), ("auto", 1000, False)],
)
def test_quantized_weights_become_dense_when_that_fits(
    tmp_path: Path, dequantize: str, budget_bytes: int | None, dense: bool
) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=3, width=64, vocab=320, quantize_bits=4, dtype="bfloat16")
    loaded = load_slice(
        model_dir,
        0,
        3,
        device="cpu",
        dequantize=dequantize,  # type: ignore[arg-type]
        memory_budget_bytes=budget_bytes,
    )
    weights = dict(tree_flatten(loaded.slice.model.parameters()))
    assert (weights["model.layers.0.mlp.up_proj.weight"].dtype == mx.float32) == dense
    floating = {w.dtype for w in weights.values() if mx.issubdtype(w.dtype, mx.floating)}
    assert floating == {mx.float32}
    cost = checkpoint.layer_costs(model_dir).slice(0, 3)
    if dense:
        assert loaded.num_bytes == cost.dense_bytes
    else:
        assert loaded.num_bytes < cost.dense_bytes / 3


def test_dense_and_quantized_slices_agree(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=3, width=64, vocab=320, quantize_bits=4, dtype="bfloat16")
    tokens = mx.array([[1, 2, 3, 4]])
    outputs = []
    for dequantize in ("always", "never"):
        part = load_slice(model_dir, 0, 3, device="cpu", dequantize=dequantize).slice  # type: ignore[arg-type]
        (logits,) = part(tokens, [], part.make_caches(), head="all")
        outputs.append(logits)
    assert mx.allclose(*outputs, atol=1e-4)


def test_an_architecture_that_mlx_lm_does_not_know_is_refused(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=2, width=32, vocab=300)
    config = tiny_config("qwen2", layers=2, width=32, vocab=300) | {"model_type": "no_such_family"}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="no_such_family"):
        load_slice(model_dir, 0, 1, device="cpu")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=2, width=32, vocab=300)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="Missing"):
        load_slice(model_dir, 0, 1, device="cpu")


@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=2, width=32, vocab=300)
    with pytest.raises(PlanError, match=r"runtime\.device is gpu"):
        load_slice(model_dir, 0, 1, device="gpu")


MEASURE = """
import json, sys
from pathlib import Path
from mlx_cluster.model.runner import SliceRunner
import mlx.core as mx

def memory(line):  # of this process alone: getrusage would start with the peak of the parent
    return int(next(l for l in open("/proc/self/status") if l.startswith(line)).split()[1]) * 1024

mx.eval(mx.ones((256, 256)) @ mx.ones((256, 256)))
before = memory("VmRSS")
runner = SliceRunner.load(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), device="cpu", dequantize=sys.argv[4])
print(json.dumps({
    "before": before, "after": memory("VmRSS"), "peak": memory("VmHWM"),
    "slice": runner.slice_bytes, "active": runner.memory_bytes,
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["float16", "4-bit"])
def test_a_middle_third_takes_a_third_of_the_memory(tmp_path: Path, form: str) -> None:
    """A child process holds the slice's bytes and little more, also at its peak, while weights are cast or unpacked."""
    bits = 4 if form == "4-bit" else None
    model_dir = write_tiny_model(tmp_path / "m", layers=9, width=1024, vocab=1024, dtype="float16", quantize_bits=bits)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model_dir), "3", "6", "always" if bits else "auto"],
        check=True,
        capture_output=True,
        timeout=110,
    )
    seen = json.loads(result.stdout)
    assert seen["slice"] == checkpoint.layer_costs(model_dir).slice(3, 6).dense_bytes
    assert seen["slice"] > 100 * 1024 * 1024
    assert seen["active"] == pytest.approx(seen["slice"], rel=0.02)
    allowed = 1.15 * (seen["slice"] + seen["before"])
    assert seen["after"] <= allowed
    assert seen["peak"] <= allowed


def test_another_thread_waits_for_and_reads_what_this_one_dispatched(tmp_path: Path) -> None:
    """The stage's waiter thread: microbatches in flight while this thread goes on building."""
    model_dir = write_tiny_model(tmp_path / "m", layers=4, width=64, vocab=320)
    front, back = (SliceRunner.load(model_dir, *bounds, device="cpu") for bounds in ((0, 2), (2, 4)))
    spec = RowSpec(0, Sampling(temperature=0.0, top_logprobs=2), 0)
    chunks = [
        Microbatch(i, Kind.PREFILL, rows=(0,), tokens=(i, 2, 3, 4), sample=i == 5, admit=(spec,) if i == 0 else ())
        for i in range(6)
    ]
    pending = [front.submit(header, None) for header in chunks]
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(p.wait() for p in pending))
    thread.start()
    thread.join(timeout=60)
    later = [back.submit(header, outcome.frame) for header, outcome in zip(chunks, outcomes, strict=True)]
    sampled: list[Outcome] = []
    thread = threading.Thread(target=lambda: sampled.extend(p.wait() for p in later))
    thread.start()
    thread.join(timeout=60)
    whole = SliceRunner.load(model_dir, 0, 4, device="cpu")
    expected = [whole.submit(header, None).wait() for header in chunks]
    assert [o.sampled for o in sampled[:-1]] == [()] * 5
    assert sampled[-1].sampled[0].token_id == expected[-1].sampled[0].token_id
    assert sampled[-1].sampled[0].logprob == pytest.approx(expected[-1].sampled[0].logprob, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen2/untied", "gemma4_text", "deepseek_v3"])
@pytest.mark.parametrize(("before", "after"), [((0, 6), (2, 6)), ((2, 6), (0, 6)), ((0, 2), (0, 6))])
def test_weights_that_another_slice_has_are_taken_over_and_the_logits_are_the_same(
    tmp_path: Path, family: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=6, width=64, vocab=320, family=family)
    fresh = load_slice(model_dir, *after, device="cpu")
    known = SliceRunner.load(model_dir, *before, device="cpu").retire()
    kept = dict(known)
    loaded = load_slice(model_dir, *after, device="cpu", known=known)
    assert known == {}
    assert loaded.num_bytes == fresh.num_bytes
    now = loaded.slice.parameters_read()
    both = set(now) & set(kept)
    layers = range(max(before[0], after[0]), min(before[1], after[1]))
    assert len(both) >= len(layers) > 0
    assert all(now[name] is kept[name] for name in both)
    tokens = mx.array([[1, 2, 3]])
    outputs = [
        part(tokens, part.stand_ins(1, 3), part.make_caches(), head="last") for part in (fresh.slice, loaded.slice)
    ]
    for one, other in zip(*outputs, strict=True):
        assert mx.array_equal(one, other)


def test_weights_in_another_form_are_read_again(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "m", layers=3, width=64, vocab=320, quantize_bits=4, dtype="bfloat16")
    known = SliceRunner.load(model_dir, 0, 2, device="cpu", dequantize="never").retire()
    loaded = load_slice(model_dir, 0, 3, device="cpu", dequantize="always", known=known)
    fresh = load_slice(model_dir, 0, 3, device="cpu", dequantize="always")
    pairs = zip(loaded.slice.parameters_read().items(), fresh.slice.parameters_read().items(), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name
        assert mx.array_equal(one, other), name
