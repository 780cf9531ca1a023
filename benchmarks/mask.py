"""What the masks of structured output cost at the last stage: eight rows, a vocabulary of 152,000.

    python benchmarks/mask.py --json mask.json
    python benchmarks/mask.py --digits 3

Every step fills the masks of all rows (``model.grammar``, as the sampler asks for them, on all cores), draws a token
that each allows and lets the row's grammar consume it; rows that end begin again. Printed are the milliseconds of a
step for all rows, by the clock and of the process's CPU time, beside 5 % of a step of 20 ms.
The masks are computed while the forward pass runs, so a step waits for them only where they take longer than it; this
is their whole cost.

The vocabulary is SYNTHETIC: bytes, printable pairs, and pieces made of random syllables, words and punctuation, some
with a space in front, as byte-level vocabularies have them. It is no real model's. Digits stand alone by default, as in
Qwen2.5's 152,000 pieces; ``--digits 3`` adds all numbers of two and three digits, as Llama 3 has them. That costs: a
number with bounds or a ``multipleOf`` makes each of these pieces a path of its own through the automaton.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record, schemas
from mlx_cluster.errors import RowFailed
from mlx_cluster.model.grammar import Grammars, RowGrammar
from mlx_cluster.request import Grammar

BUDGET_MS = 0.05 * 20.0
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
    chance = random.Random(seed)
    end = vocabulary - 1

    def begin(number: int) -> RowGrammar:
        schema = schemas.schema_of(random.Random(seed * 1000 + number))
        row = grammars.begin(Grammar("json_schema", json.dumps(schema)), (), (end,))
        row.mask()  # compiled here: that is the first token's time, not a step's
        return row

    running = [begin(number) for number in range(rows)]
    taken: list[float] = []
    cpu: list[float] = []
    started = rows
    for _ in range(steps):
        before, cpu_before = time.perf_counter(), time.process_time()
        found = grammars.masks(running)
        taken.append((time.perf_counter() - before) * 1000)
        cpu.append((time.process_time() - cpu_before) * 1000)
        for index, mask in enumerate(found):
            assert not isinstance(mask, RowFailed), mask
            token = allowed(mask, chance)
            if token == end:
                running[index] = begin(started)
                started += 1
            else:
                running[index].consume(token)
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "steps": steps,
        "grammars": started,
        "ms": _quantiles(taken),
        "cpu_ms": _quantiles(cpu),
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
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = write_tokenizer(Path(folder), arguments.vocabulary, arguments.digits)
        result = run(directory, arguments.vocabulary, arguments.rows, arguments.steps, arguments.seed)
    result["digits"] = arguments.digits
    print(json.dumps(result))
    print(f"p95 {result['ms']['p95']} ms of {BUDGET_MS:g} ms (synthetic vocabulary)")
    record.save(arguments.json, "mask", result)


if __name__ == "__main__":
    main()
