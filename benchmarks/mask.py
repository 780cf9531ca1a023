"""What the masks of structured output cost at the last stage: eight rows, a vocabulary of 152,000.

    python benchmarks/mask.py --json mask.json
    python benchmarks/mask.py --digits 3

A step is what the last stage does: a forward pass is queued (EMULATED: the device is busy until 20 ms have passed), the
masks of all rows are computed meanwhile (``model.grammar``), applied to the logits, and tokens are drawn greedily
(``model.sampling``). Each is followed by the same step without grammars. Printed are the milliseconds that grammars add
to a step, beside 5 % of it, and the milliseconds that the masks alone take, by the clock and of the process's CPU time;
those disappear behind the forward pass as long as they are shorter. Rows go on with a token that their grammar allows;
those that end begin again with another random schema, whose compilation belongs to its first token and is not counted.

The vocabulary is SYNTHETIC: bytes, printable pairs, and pieces made of random syllables, words and punctuation, some
with a space in front, as byte-level vocabularies have them. It is no real model's. Digits stand alone by default, as in
Qwen2.5's 152,000 pieces; ``--digits 3`` adds all numbers of two and three digits, as Llama 3 has them. That costs: a
number with bounds or a ``multipleOf`` makes each of these pieces a path of its own through the automaton.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record, schemas
from mlx_cluster.errors import RowFailed
from mlx_cluster.model import sampling
from mlx_cluster.model.grammar import Grammars, RowGrammar
from mlx_cluster.request import Grammar, Sampling

STEP_MS = 20.0
BUDGET_MS = 0.05 * STEP_MS
END = "<|im_end|>"


def write_tokenizer(directory: Path, vocabulary: int, digits: int = 1, seed: int = 0) -> Path:
    """A byte-level tokenizer with this many pieces, and an end token; numbers of up to ``digits`` digits are pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    chance = random.Random(seed)
    pieces = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for length in range(2, digits + 1):
        pieces |= dict.fromkeys(f"{number:0{length}}" for number in range(10**length))
    marks = list("{}[]\",:.-_/()=+*<>!?'")
    while len(pieces) < vocabulary - 1:
        kind = chance.random()
        if kind < 0.9:
            word = "".join(
                chance.choice("bcdfghjklmnprstvwz") + chance.choice("aeiouy") for _ in range(chance.randint(1, 5))
            )
            word = word.capitalize() if chance.random() < 0.2 else word
        else:
            word = "".join(chance.choices(marks, k=chance.randint(2, 5)))
        pieces["Ġ" + word if chance.random() < 0.4 else word] = None
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": vocabulary - 1}))
    return directory


def allowed(mask: np.ndarray[Any, np.dtype[np.uint32]], chance: random.Random) -> int:
    """One of the tokens that the mask allows."""
    words = np.flatnonzero(mask)
    word = int(words[chance.randrange(len(words))])
    bits = [bit for bit in range(32) if int(mask[word]) >> bit & 1]
    return word * 32 + chance.choice(bits)


def run(directory: Path, vocabulary: int, rows: int, steps: int, seed: int) -> dict[str, Any]:
    grammars = Grammars(directory, vocabulary)
    logits = mx.random.normal((rows, vocabulary), key=mx.random.key(0))
    mx.eval(logits)
    draws = [sampling.Draw(Sampling(temperature=0.0, seed=1), 0, row) for row in range(rows)]
    chance = random.Random(seed)
    end = vocabulary - 1

    def begin(number: int) -> RowGrammar:
        schema = schemas.schema_of(random.Random(seed * 1000 + number))
        row = grammars.begin(Grammar("json_schema", json.dumps(schema)), (), (end,))
        row.mask()  # compiled here: that is the first token's time, not a step's
        return row

    running = [begin(number) for number in range(rows)]
    steps_ms: dict[bool, list[float]] = {True: [], False: []}
    masks_ms: list[float] = []
    cpu_ms: list[float] = []
    started = rows
    for _ in range(steps):
        for constrained in (True, False):
            before = time.perf_counter()
            found: dict[int, Any] = {}
            limits = None
            if constrained:
                masks_before, cpu_before = time.perf_counter(), time.process_time()
                found = dict(enumerate(grammars.masks(running)))
                limits = sampling.limits(found, vocabulary)
                masks_ms.append((time.perf_counter() - masks_before) * 1000)
                cpu_ms.append((time.process_time() - cpu_before) * 1000)
            time.sleep(max(0.0, before + STEP_MS / 1000 - time.perf_counter()))
            sampling.sample(logits, draws, limits).tokens.tolist()
            steps_ms[constrained].append((time.perf_counter() - before) * 1000)
            for index, mask in found.items():
                assert not isinstance(mask, RowFailed), mask
                token = allowed(mask, chance)
                if token == end:
                    running[index] = begin(started)
                    started += 1
                else:
                    running[index].consume(token)
    plain = statistics.median(steps_ms[False])
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "steps": steps,
        "grammars": started,
        "step_ms": round(plain, 3),
        "added_ms": _quantiles([each - plain for each in steps_ms[True]]),
        "noise_ms": _quantiles([each - plain for each in steps_ms[False]]),
        "masks_ms": _quantiles(masks_ms),
        "masks_cpu_ms": _quantiles(cpu_ms),
        "budget_ms": BUDGET_MS,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 3) for q in (50, 90, 95, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--digits", type=int, default=1, help="the longest number that is one piece")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = write_tokenizer(Path(folder), arguments.vocabulary, arguments.digits)
        result = run(directory, arguments.vocabulary, arguments.rows, arguments.steps, arguments.seed)
    result["digits"] = arguments.digits
    print(json.dumps(result))
    added, noise = result["added_ms"], result["noise_ms"]
    print(
        f"grammars add {added['p50']} ms to a step of {result['step_ms']} ms, p95 {added['p95']} of {BUDGET_MS:g} ms "
        f"(without them p95 {noise['p95']}); masks alone p95 {result['masks_ms']['p95']} ms (synthetic vocabulary)"
    )
    record.save(arguments.json, "mask", result)


if __name__ == "__main__":
    main()
