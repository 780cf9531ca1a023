"""Greedy tokens of mlx-lm itself: its ``generate_step`` on the same cast weights, in a process of its own.

    python -m tests.reference_tokens MODEL_DIR        prompts as JSON on stdin, tokens and gaps as JSON on stdout

A process of its own, because mlx belongs to one thread of a process, and so that it can have the same BLAS preloaded as
the stages. ``gap`` is the smallest distance between the two best log probabilities over all steps: prompts whose
reference nearly ties say nothing about exactness (BLAS kernels differ by 1e-6 between batch sizes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_cluster.stage import blas

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Reference:
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    gap: float


def reference_tokens(
    model_dir: Path, prompts: list[tuple[int, ...]], num_tokens: int, *, dequantize: bool = False
) -> list[Reference]:
    """Greedy continuations of all prompts, each computed alone."""
    job = {"prompts": prompts, "num_tokens": num_tokens, "dequantize": dequantize}
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference_tokens", str(model_dir)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, **blas.environment(blas.find(), threads=1)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return [Reference(p, tuple(a["tokens"]), a["gap"]) for p, a in zip(prompts, answers, strict=True)]


def main() -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import dequantize_model, load_model

    mx.set_default_device(mx.cpu)
    job = json.load(sys.stdin)
    model, _ = load_model(Path(sys.argv[1]))
    model.set_dtype(mx.float32)  # the scales first: dequantizing in bfloat16 would round the weights once more
    if job["dequantize"]:
        model = dequantize_model(model)
    mx.eval(model.parameters())
    answers = []
    for prompt in job["prompts"]:
        tokens, gap = [], float("inf")
        for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=job["num_tokens"]):
            best = mx.sort(logprobs)[-2:]
            gap = min(gap, (best[1] - best[0]).item())
            tokens.append(int(token))
        answers.append({"tokens": tokens, "gap": gap})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
