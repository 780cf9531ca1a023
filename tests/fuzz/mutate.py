"""Requests that go wrong in every way that clients have: by structure, by bytes, by HTTP.

Owns: the mutations. Pure: the same ``random.Random`` gives the same requests.
Does not own: what a right answer is (``answers``).
"""

from __future__ import annotations

import copy
import json
import random
import string
from dataclasses import dataclass, field
from typing import Any

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")
CONTENT_TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-16",
    "application/jsonl",
    "",
    "APPLICATION/JSON",
    "application/json;" + "x" * 300,
    "é",
)


def _nested(depth: int, of: str) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value] if of == "list" else {"type": value, "a": value} if depth < 8 else {"items": value}
    return value


# Stands in the printed JSON for what json.dumps would not write.
RAW = {
    "@nan@": "NaN",
    "@inf@": "-Infinity",
    "@huge@": "9" * 5000,
    "@exp@": "1e999999",
    "@hex@": "0x10",
    "@half@": '"\\ud800"',
    "@pair@": '"\\ud83d\\ude00"',
    "@control@": '"a\x01b"',
    "@deep@": "[" * 3000 + "]" * 3000,
    "@open@": "[" * 200_000,
    "@objects@": '{"a":' * 1500 + "1" + "}" * 1500,
}
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    "",
    " ",
    "x",
    "x" * 5000,
    "\x00",
    "é漢🎉\u202e",
    "<|im_end|>",
    "refuse me",
    "{{ 7 * 7 }}",
    "tiny",
    "org/late/../x",
    [],
    [[]],
    [None],
    [0] * 300,
    ["a"] * 50,
    {},
    {"": ""},
    {"type": "text"},
    {"type": "function"},
    {"type": ["x"]},
    {"$ref": "#"},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/definitions/none"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"pattern": "(a+)+$", "type": "string"},
    {"role": "user", "content": "x"},
    _nested(5, "object"),
    _nested(70, "list"),
    *RAW,
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as it goes to the application."""

    method: str
    path: str
    body: bytes
    query: str = ""
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    made_by: str = ""
    fields: tuple[str, ...] = field(default=())


def mutated(chance: random.Random, path: str, seeds: list[dict[str, Any]]) -> Sent:
    """One mutation of one seed: half of them in the structure, the others in the bytes or around them."""
    body = copy.deepcopy(chance.choice(seeds))
    how = chance.choices(("structure", "bytes", "http"), (7, 2, 1))[0]
    if how == "structure":
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            _change(body, chance)
        return Sent("POST", path, _printed(body), made_by=how)
    if how == "bytes":
        return Sent("POST", path, _broken(json.dumps(body).encode(), chance), made_by=how)
    return _around(path, json.dumps(body).encode(), chance)


def _printed(body: Any) -> bytes:
    text = json.dumps(body)
    for mark, raw in RAW.items():
        if mark in text:
            text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _change(body: dict[str, Any], chance: random.Random) -> None:
    """Change one value, anywhere: replace, remove, wrap, add, rename, swap."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [body]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    if not places:
        body["model"] = copy.deepcopy(chance.choice(VALUES))
        return
    node, key = chance.choice(places)
    match chance.randrange(8):
        case 0:
            del node[key]
        case 1:
            node[key] = chance.choice(([node[key]], {"x": node[key]}, json.dumps(node[key])))
        case 2 if isinstance(node, dict):
            node[_name(chance)] = copy.deepcopy(chance.choice(VALUES))
        case 3 if isinstance(node, dict):
            node[_name(chance)] = node.pop(key)
        case 4:
            other, place = chance.choice(places)
            node[key] = copy.deepcopy(other[place])
        case 5 if isinstance(node, list):
            node.extend(copy.deepcopy(node[key]) for _ in range(chance.choice((1, 3, 40))))
        case _:
            node[key] = copy.deepcopy(chance.choice(VALUES))


def _name(chance: random.Random) -> str:
    return chance.choice(
        (
            "echo",
            "suffix",
            "best_of",
            "stream",
            "n",
            "logprobs",
            "stop",
            "type",
            "",
            "\x00",
            "é",
            "__class__",
            "x" * 300,
        )
    ) or "".join(chance.choices(string.ascii_lowercase, k=3))


def _broken(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    match chance.randrange(9):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]
        case 2:
            return raw[:at] + chance.choice((b"\xff", b"\xed\xa0\x80", b"\x00", b",", b'"', b"}", b"{")) + raw[at:]
        case 3:
            return b"\xef\xbb\xbf" + raw
        case 4:  # twice the same key, with another value
            return raw[:-1] + b', "model": ' + json.dumps(chance.choice(VALUES[:25])).encode() + b"}"
        case 5:
            return raw + chance.choice((b" ", b"{}", b"\x00", b"\n\n"))
        case 6:
            return raw.decode().encode("utf-16")
        case 7:
            return chance.choice((b"", b"null", b"[]", b'"x"', b"1", b"{}", b"{", b"[" * 100_000, b'{"a":' * 50_000))
        case _:
            return chance.randbytes(chance.randrange(1, 200))


def _around(path: str, raw: bytes, chance: random.Random) -> Sent:
    headers = [("content-type", "application/json")]
    method, query, made_by = "POST", "", "http"
    match chance.randrange(7):
        case 0:
            method = chance.choice(METHODS)
        case 1:
            headers[0] = ("content-type", chance.choice(CONTENT_TYPES))
        case 2:
            headers = []
        case 3:
            path += chance.choice(("/", "/x", "//", "/..", "/%00", "/é", "/" + "x" * 500))
        case 4:
            query = chance.choice(("beta=true", "stream=1&stream=2", "%ff=%00", "a" * 2000, "limit=-1", "=&&="))
        case 5:
            name = chance.choice(("anthropic-version", "anthropic-beta", "x-request-id", "content-length", "accept"))
            value = chance.choice(("", "2023-06-01", "\xff", "x" * 4000, "-5", "99999999999999999999", "a,b,,c", "*/*"))
            headers.append((name, value))
        case _:
            headers.append(
                chance.choice((("host", "evil.example"), ("origin", "http://evil.example"), ("origin", "null")))
            )
    return Sent(method, path, raw, query, tuple(headers), made_by=made_by)
