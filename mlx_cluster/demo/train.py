"""Trains the built-in demo model: ``python -m mlx_cluster.demo.train --out DIR``.

Owns the architecture, the first weights, the training loop and what is written to the model directory. Does not own
the text (``lessons``) or the tokenizer (``vocabulary``). Invariant: the same seed on the same machine with the same
libraries gives the same model; progress is saved, and a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.qwen2 import Model, ModelArgs
from transformers import PreTrainedTokenizerFast

from mlx_cluster.demo.lessons import Corpus, Lessons, Turn, read_corpus
from mlx_cluster.demo.vocabulary import END, PAD, START, train_tokenizer

MAX_POSITIONS = 2048
COPY_HEAD_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a run depends on besides the corpus."""

    steps: int = 1200
    seed: int = 7
    vocab_size: int = 1536
    layers: int = 28
    hidden: int = 128
    intermediate: int = 192  # with one key-value head the largest multiple of 64 that stays below 8 MB at 16 bits
    rows: int = 16
    length: int = 128
    long_every: int = 4  # every fourth batch has long rows, so that chats of a few hundred tokens work
    long_rows: int = 4
    long_length: int = 384
    peak_rate: float = 1.5e-3
    warmup_steps: int = 50
    decay_steps: int = 400  # the rate is constant before; so a run can be made longer from its checkpoint
    half_steps: int = 250  # steps with half the rows: the beginning needs steps more than it needs tokens
    weight_decay: float = 0.05
    frozen_steps: int = 200  # the copying heads are held: unprotected, the large first updates destroy them
    noise_steps: int = 50  # at first only copies of random tokens
    noise_fade_steps: int = 80  # then their share falls to the floor
    noise_floor: float = 0.1
    copying: float = 0.5  # share of copying tasks among all other exchanges
    shards: int = 2  # parts of a batch that are computed at once, each on its own stream

    def noise_share(self, step: int) -> float:
        """Share of the exchanges of a step that copy random tokens."""
        faded = min(1.0, max(0.0, (step - self.noise_steps) / self.noise_fade_steps))
        return 1.0 - faded * (1.0 - self.noise_floor)

    def model_args(self) -> ModelArgs:
        return ModelArgs(
            model_type="qwen2",
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=1,
            rms_norm_eps=1e-6,
            vocab_size=self.vocab_size,
            max_position_embeddings=MAX_POSITIONS,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        )


# --- first weights -----------------------------------------------------------------------------------------------


def first_weights(args: ModelArgs, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights in which the first layers already have the shape of an induction circuit.

    Residual branches start at zero (``o_proj``, ``down_proj``), so that 28 layers train like few. In layer 0 a head
    looks at the previous position, through its biases alone: they turn with the position, so only a distance of one
    fits. It writes what it sees into a subspace of its own. A head in each of the next layers compares that subspace
    with the present token and copies what it finds. Plain random weights take many times the steps to find this.
    The embeddings are large, and the last norm small in turn: Adam moves every weight by the rate at once, and the sum
    of 28 branches would otherwise drown them in the first steps.
    """
    hidden, inner, embedding_scale = args.hidden_size, args.intermediate_size, 0.3
    dim = hidden // args.num_attention_heads

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(size=shape) * scale

    def orthonormal(rows: int, columns: int) -> np.ndarray:
        q, _ = np.linalg.qr(rng.normal(size=(columns, rows)))
        return q.T

    weights = {
        "model.embed_tokens.weight": normal(args.vocab_size, hidden, scale=embedding_scale),
        "model.norm.weight": np.full(hidden, 0.04 / embedding_scale),
    }
    for layer in range(args.num_hidden_layers):
        shapes = {
            "self_attn.q_proj.weight": normal(hidden, hidden, scale=hidden**-0.5),
            "self_attn.q_proj.bias": np.zeros(hidden),
            "self_attn.k_proj.weight": normal(dim, hidden, scale=hidden**-0.5),
            "self_attn.k_proj.bias": np.zeros(dim),
            "self_attn.v_proj.weight": normal(dim, hidden, scale=hidden**-0.5),
            "self_attn.v_proj.bias": np.zeros(dim),
            "self_attn.o_proj.weight": np.zeros((hidden, hidden)),
            "mlp.gate_proj.weight": normal(inner, hidden, scale=hidden**-0.5),
            "mlp.up_proj.weight": normal(inner, hidden, scale=hidden**-0.5),
            "mlp.down_proj.weight": np.zeros((hidden, inner)),
            "input_layernorm.weight": np.ones(hidden),
            "post_attention_layernorm.weight": np.ones(hidden),
        }
        weights |= {f"model.layers.{layer}.{name}": value for name, value in shapes.items()}

    half = dim // 2
    angles = args.rope_theta ** (
        -np.arange(half) / half
    )  # per position, fastest first; rotated pairs are (i, i + half)
    fast = np.arange(half) < 8
    slow = np.tile(np.arange(half) >= 14, 2)
    read, write = orthonormal(dim, hidden), orthonormal(dim, hidden).T
    for layer in range(min(COPY_HEAD_LAYERS, args.num_hidden_layers)):
        prefix = f"model.layers.{layer}.self_attn"
        query, key = normal(hidden, hidden, scale=0.02), normal(dim, hidden, scale=0.02)
        value, output = orthonormal(dim, hidden), np.zeros((hidden, hidden))
        if layer == 0:
            strength = 6.0 * fast
            weights[f"{prefix}.k_proj.bias"][:half] = strength
            weights[f"{prefix}.q_proj.bias"][:half] = strength * np.cos(angles)
            weights[f"{prefix}.q_proj.bias"][half:dim] = -strength * np.sin(angles)
            value = read
            output[:, :dim] = write * embedding_scale * 1.4
        else:
            match = orthonormal(int(slow.sum()), dim) * 1.6
            key[slow] += match @ write.T
            query[dim : 2 * dim][slow] += match @ read
            output[:, dim : 2 * dim] = value.T * embedding_scale * 1.5
        weights[f"{prefix}.q_proj.weight"], weights[f"{prefix}.k_proj.weight"] = query, key
        weights[f"{prefix}.v_proj.weight"], weights[f"{prefix}.o_proj.weight"] = value, output
    return weights


# --- batches -----------------------------------------------------------------------------------------------------


Target = tuple[int, float]  # a token and how much it counts in the loss


@dataclass(frozen=True, slots=True)
class Batch:
    tokens: mx.array  # [rows, length]
    weights: mx.array  # [rows, length], of each token as a target


class Batches:
    """Rows of conversations, each filled with exchanges up to its length."""

    def __init__(self, recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
        self._recipe, self._corpus, self._tokenizer = recipe, corpus, tokenizer
        self._start, self._end, self._pad = tokenizer.convert_tokens_to_ids([START, END, PAD])
        self._newline = self._encode("\n")

    def at(self, step: int) -> Batch:
        """The batch of a step: always the same one, so that a resumed run sees what it would have seen."""
        recipe = self._recipe
        rng = np.random.default_rng([recipe.seed, step])
        lessons = Lessons(self._corpus, rng)
        is_long = step % recipe.long_every == recipe.long_every - 1
        rows, length = (recipe.long_rows, recipe.long_length) if is_long else (recipe.rows, recipe.length)
        if step < recipe.half_steps:
            rows = max(recipe.shards, rows // 2)
        tokens = np.full((rows, length), self._pad, dtype=np.int32)
        weights = np.zeros((rows, length), dtype=np.float32)
        for row in range(rows):
            targets = self._conversation(lessons, rng, recipe.noise_share(step), length)
            tokens[row], weights[row] = zip(*targets, strict=True)
        return Batch(mx.array(tokens), mx.array(weights))

    def _conversation(self, lessons: Lessons, rng: np.random.Generator, noise: float, length: int) -> list[Target]:
        targets = [target for turn in lessons.opening() for target in self._turn(turn)]
        while len(targets) < length:
            if rng.random() < noise:
                targets += self._noise_exchange(rng)
            else:
                for turn in lessons.exchange(self._recipe.copying):
                    targets += self._turn(turn)
        return targets[:length]

    def _turn(self, turn: Turn) -> list[Target]:
        return self._message(turn.role, self._encode(turn.text), turn.weight)

    def _noise_exchange(self, rng: np.random.Generator) -> list[Target]:
        """Random tokens to repeat. As they mean nothing, only looking back helps."""
        first_ordinary = max(self._start, self._end, self._pad) + 1
        noise = rng.integers(first_ordinary, self._recipe.vocab_size, rng.integers(4, 40)).tolist()
        question = self._message("user", [*self._encode("Repeat: "), *noise], 0.0)
        return question + self._message("assistant", noise, 1.0)

    def _message(self, role: str, body: list[int], weight: float) -> list[Target]:
        head = [self._start, *self._encode(role + "\n")]
        weighted = [(token, weight) for token in (*body, self._end)]
        return [(token, 0.0) for token in head] + weighted + [(token, 0.0) for token in self._newline]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


# --- training ----------------------------------------------------------------------------------------------------


def weighted_loss(model: Model, tokens: mx.array, weights: mx.array, total: mx.array) -> mx.array:
    """Cross entropy of the next token, each counted by its weight, divided by the weight of the whole batch."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * weights[:, 1:]).sum() / total


class Trainer:
    """The model, its optimizer and one step. A batch is cut into shards, each on its own stream, so on its own core."""

    def __init__(self, recipe: Recipe) -> None:
        args = recipe.model_args()
        self.model = Model(args)
        first = first_weights(args, np.random.default_rng(recipe.seed))
        self.model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in first.items()])
        decay_steps = min(recipe.decay_steps, max(1, recipe.steps - recipe.warmup_steps))
        rates = optim.join_schedules(
            [
                optim.linear_schedule(recipe.peak_rate / 20, recipe.peak_rate, recipe.warmup_steps),
                lambda _: mx.array(recipe.peak_rate),
                optim.linear_schedule(recipe.peak_rate, recipe.peak_rate / 100, decay_steps),
            ],
            [recipe.warmup_steps, max(recipe.warmup_steps, recipe.steps - decay_steps)],
        )
        self.optimizer = optim.AdamW(rates, betas=[0.9, 0.98], weight_decay=recipe.weight_decay)
        self.optimizer.init(self.model.trainable_parameters())
        self._frozen_steps = recipe.frozen_steps
        self._loss_and_gradients = nn.value_and_grad(self.model, weighted_loss)
        self._streams = [mx.new_stream(mx.default_device()) for _ in range(recipe.shards)]
        mx.eval(self.model.parameters(), self.optimizer.state)

    def step(self, batch: Batch) -> float:
        """One update; the loss before it."""
        self._freeze_or_thaw_copy_heads()
        total = mx.maximum(batch.weights[:, 1:].sum(), 1.0)
        mx.eval(batch.tokens, batch.weights, total)
        num_shards = len(self._streams)
        losses, gradients = [], []
        for index, stream in enumerate(self._streams):
            with mx.stream(stream):
                shard = batch.tokens[index::num_shards], batch.weights[index::num_shards]
                loss, gradient = self._loss_and_gradients(self.model, *shard, total)
            losses.append(loss)
            gradients.append(gradient)
        mx.eval(losses, gradients)
        summed = gradients[0] if num_shards == 1 else tree_map(lambda *parts: sum(parts[1:], parts[0]), *gradients)
        clipped, _ = optim.clip_grad_norm(summed, 1.0)
        self.optimizer.update(self.model, clipped)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return float(sum(loss.item() for loss in losses))

    def _freeze_or_thaw_copy_heads(self) -> None:
        frozen = self.optimizer.step.item() < self._frozen_steps
        for layer in self.model.layers[:COPY_HEAD_LAYERS]:
            (layer.self_attn.freeze if frozen else layer.self_attn.unfreeze)()

    def save(self, path: Path) -> None:
        arrays = {f"model.{k}": v for k, v in tree_flatten(self.model.parameters())}
        arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer.state)}
        part = path.with_name("part-" + path.name)
        mx.save_safetensors(str(part), arrays)
        part.replace(path)

    def restore(self, path: Path) -> int:
        """Take up what ``save`` wrote; the number of steps done."""
        arrays: Any = mx.load(str(path))
        halves: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for name, value in arrays.items():
            half, _, key = name.partition(".")
            halves[half].append((key, value))
        self.model.load_weights(halves["model"])
        self.optimizer.state = tree_unflatten(halves["optimizer"])
        mx.eval(self.model.parameters(), self.optimizer.state)
        return int(self.optimizer.step.item())


# --- the model directory -----------------------------------------------------------------------------------------


def export(model: Model, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path) -> None:
    """Write what mlx-lm reads: weights at 16 bits, config, generation defaults, tokenizer with its template."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.astype(mx.float16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    config = asdict(recipe.model_args()) | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "torch_dtype": "float16",
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    for name in ("rope_traditional", "rope_scaling"):
        config.pop(name)
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))


def train(recipe: Recipe, out: Path, corpus: Corpus, report: Any = print, checkpoint_every: int = 50) -> float:
    """Train and write the model to ``out``; the mean loss of the last steps.

    Beside it, in ``out/checkpoint``, lies the state of an unfinished run, and a run with the same recipe takes it up.
    """
    tokenizer = train_tokenizer(corpus.texts(), recipe.vocab_size, MAX_POSITIONS)
    batches = Batches(recipe, corpus, tokenizer)
    trainer = Trainer(recipe)
    checkpoint = out / "checkpoint" / f"state-{recipe.seed}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    done = trainer.restore(checkpoint) if checkpoint.exists() else 0
    started, recent = time.monotonic(), [0.0]
    for step in range(done, recipe.steps):
        loss = trainer.step(batches.at(step))
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}: lower peak_rate {recipe.peak_rate}")
        recent = [*recent[-19:], loss] if step > done else [loss]
        if step % 20 == 0 or step == recipe.steps - 1:
            seconds = (time.monotonic() - started) / (step - done + 1)
            report(f"step {step:5d}  loss {sum(recent) / len(recent):.3f}  {seconds:.2f} s per step", flush=True)
        if step % checkpoint_every == checkpoint_every - 1:
            trainer.save(checkpoint)
    export(trainer.model, tokenizer, recipe, out)
    checkpoint.unlink(missing_ok=True)
    checkpoint.parent.rmdir()
    return sum(recent) / len(recent)


def with_fast_blas(arguments: Sequence[str]) -> None:
    """Start this program again with OpenBLAS preloaded, where there is one: 10 to 50 times the matrix speed.

    The Linux wheel of mlx links the reference BLAS; a preloaded library takes its place by name.
    """
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ:
        return
    library = ctypes.util.find_library("openblas")
    if library is None:
        print("OpenBLAS was not found: training will take many times longer (Debian: libopenblas0-pthread).")
        return
    environment = os.environ | {"LD_PRELOAD": library}
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # one per shard; more would only wait for each other
    environment.setdefault("MLX_BFS_MAX_WIDTH", "100000")  # order the graph by breadth, or shards run one after another
    os.execve(sys.executable, [sys.executable, "-m", "mlx_cluster.demo.train", *arguments], environment)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_cluster.demo.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    options = parser.parse_args(arguments)
    with_fast_blas(sys.argv[1:] if arguments is None else arguments)
    if sys.platform == "linux":
        mx.set_default_device(mx.cpu)
    train(Recipe(steps=options.steps, seed=options.seed), options.out, read_corpus())


if __name__ == "__main__":
    main()
