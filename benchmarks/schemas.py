"""Do constrained answers hold? Random JSON schemas, the demo model at temperature 1, every answer parsed and validated.

    python benchmarks/schemas.py                                # starts a cluster of its own, 200 schemas
    python benchmarks/schemas.py --url http://127.0.0.1:8000 --model demo --count 20

For each schema two requests: ``response_format`` json_schema, and a tool with the schema as its parameters (required
and named in turn). A finish of ``stop`` (``tool_calls`` for a tool) must parse and validate, without exception; 95 % of
the requests must end so, the others were cut at max_tokens. Everything in the schemas is bounded: strings and arrays by
their lengths, numbers by ``multipleOf``. Without it a number may have any number of digits, as times have in RFC 3339
(which also knows the second 60, a small z and the year 0, and jsonschema's checker does not): a tiny model goes on with
them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record

MAX_TOKENS = 700
WORDS = ("name", "kind", "count", "ratio", "done", "tags", "owner", "where", "é", "a b", 'q"uote', "nested", "list")


def schema_of(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random object schema with bounded strings and arrays."""
    names = chance.sample(WORDS, chance.randint(1, 4 if depth == 0 else 2))
    required = [name for name in names if chance.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _value(chance, depth) for name in names},
        "required": required or names[:1],
        "additionalProperties": False,
    }


def _value(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "minLength": chance.randint(0, 3), "maxLength": chance.randint(3, 16)},
        lambda: {
            "type": "string",
            "pattern": chance.choice(("^[a-z]{2,6}$", "^[A-Z][0-9]{1,3}$", "^(ab|cd){1,3}[xyz]{1,2}$")),
        },
        lambda: {"type": "string", "format": chance.choice(("ipv4", "uuid"))},
        lambda: {"type": "integer", "minimum": chance.randint(-50, 0), "maximum": chance.randint(1, 2000)},
        lambda: {"type": "number", "minimum": -1.5, "maximum": chance.choice((0.25, 10, 1000.5)), "multipleOf": 0.25},
        lambda: {"type": "boolean"},
        lambda: {"enum": chance.sample(["red", "green", "blue", 1, 2.5, None, True, "ü"], chance.randint(1, 4))},
        lambda: {"const": chance.choice(["fixed", 7, False, {"a": [1]}])},
        lambda: {"type": "null"},
        lambda: {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 5}]},
    ]
    if depth < 2:
        kinds += [
            lambda: {
                "type": "array",
                "items": _value(chance, depth + 1),
                "minItems": chance.randint(0, 1),
                "maxItems": chance.randint(1, 3),
            },
            lambda: schema_of(chance, depth + 1),
        ]
    return chance.choice(kinds)()


@dataclass(slots=True)
class Tally:
    requests: int = 0
    ended: int = 0
    cut: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def share_ended(self) -> float:
        return self.ended / max(1, self.requests)


def check(tally: Tally, schema: dict[str, Any], finish: str, texts: list[str]) -> None:
    """Count one answer; ``texts`` are the JSON texts that must follow the schema."""
    tally.requests += 1
    if finish == "length":
        tally.cut += 1
        return
    tally.ended += 1
    try:
        if not texts:
            raise ValueError(f"it ended with {finish} and without JSON")
        for text in texts:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        tally.wrong.append(f"{json.dumps(schema)} -> {texts}: {str(error).splitlines()[0]}")


async def run(url: str, model: str, count: int, seed: int, at_once: int = 8) -> dict[str, Tally]:
    """Both kinds of request for ``count`` schemas. Raises ``httpx.HTTPStatusError`` for a refusal."""
    tallies = {"response_format": Tally(), "required": Tally(), "named": Tally()}
    order = iter(range(count))

    async def worker(client: httpx.AsyncClient) -> None:
        for number in order:
            schema = schema_of(random.Random(seed * 100_003 + number))
            asked = {
                "model": model,
                "messages": [{"role": "user", "content": f"Fill in form {number}."}],
                "temperature": 1,
                "seed": seed + number,
                "max_tokens": MAX_TOKENS,
            }
            shape = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
            choice = await _ask(client, {**asked, "response_format": shape})
            text = choice["message"]["content"]
            check(tallies["response_format"], schema, choice["finish_reason"], [text] if text else [])
            kind = ("required", "named")[number % 2]
            named = {"type": "function", "function": {"name": "fill"}}
            tool = {"type": "function", "function": {"name": "fill", "parameters": schema}}
            wish = {"tools": [tool], "tool_choice": named if kind == "named" else kind, "parallel_tool_calls": False}
            choice = await _ask(client, {**asked, **wish})
            calls = choice["message"].get("tool_calls") or []
            check(tallies[kind], schema, choice["finish_reason"], [call["function"]["arguments"] for call in calls])

    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
    return tallies


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        raise httpx.HTTPStatusError(answer.text, request=answer.request, response=answer)
    return dict(answer.json()["choices"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a running cluster, without /v1")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.url:
        tallies = asyncio.run(run(arguments.url.rstrip("/"), arguments.model, arguments.count, arguments.seed))
    else:
        from tests.e2e.test_up import up

        with up("--nodes", "2") as launcher:
            launcher.ready_line()
            tallies = asyncio.run(run(launcher.url, "demo", arguments.count, arguments.seed))
    for name, tally in tallies.items():
        share = f"{tally.ended} ended ({tally.share_ended:.1%})"
        print(f"{name:16} {tally.requests} requests, {share}, {len(tally.wrong)} wrong")
        for line in tally.wrong[:5]:
            print("   ", line[:600])
    record.save(arguments.json, "schemas", {name: asdict(tally) for name, tally in tallies.items()})
    requests = sum(tally.requests for tally in tallies.values())
    good = sum(tally.ended for tally in tallies.values()) >= 0.95 * requests
    sys.exit(0 if good and not any(tally.wrong for tally in tallies.values()) else 1)


if __name__ == "__main__":
    main()
