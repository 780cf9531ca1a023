"""The field tables of the documentation, printed from the tables that decide.

``python -m mlx_cluster.gateway.field_docs`` prints them; with the path of a page it writes them into that page, between
its two marks.

Owns: their form in Markdown. Does not own: what happens to a field (``fields``).
Invariant: every rule of every dialect is printed, once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from mlx_cluster.gateway import fields
from mlx_cluster.gateway.fields import Rule

BEGIN = "<!-- fields: begin -->"
END = "<!-- fields: end -->"

DIALECTS: Mapping[str, Mapping[str, Rule]] = {
    "POST /v1/chat/completions": fields.CHAT,
    "POST /v1/completions": fields.COMPLETION,
    "POST /v1/responses": fields.RESPONSES,
    "POST /v1/messages": fields.MESSAGES,
    "POST /api/chat": fields.OLLAMA_CHAT,
    "POST /api/generate": fields.OLLAMA_GENERATE,
    "options of /api/chat and /api/generate": fields.OLLAMA_OPTIONS,
    "POST /api/embed": fields.OLLAMA_EMBED,
    "POST /api/embeddings": fields.OLLAMA_EMBEDDINGS,
    "POST /api/show": fields.OLLAMA_SHOW,
    "POST /v1/embeddings": fields.EMBEDDINGS,
    "POST /tokenize": fields.TOKENIZE,
    "POST /detokenize": fields.DETOKENIZE,
}


def tables() -> str:
    """One section per route, its fields in order of what happens to them."""
    return "\n\n".join(_section(route, table) for route, table in DIALECTS.items())


def in_page(page: str) -> str:
    """The page with these tables between its marks. Raises ``ValueError`` when it does not have both, in order."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, between which the tables belong")
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


def _section(route: str, table: Mapping[str, Rule]) -> str:
    lines = [f"### `{route}`", "", "| field | what happens | why |", "|---|---|---|"]
    plain = {kind: [name for name, rule in table.items() if rule.kind == kind] for kind in ("honoured", "advisory")}
    for kind, names in plain.items():
        if names:
            lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {kind} | |")
    for kind in ("dropped", "refused"):
        lines += [f"| `{name}` | {kind} | {_reason(rule)} |" for name, rule in table.items() if rule.kind == kind]
    return "\n".join(lines)


def _reason(rule: Rule) -> str:
    if not rule.neutral:
        return _cell(rule.why)
    accepted = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral)
    return _cell(f"{rule.why} (accepted: {accepted})")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into the page that is named."""
    if not arguments:
        print(tables())
        return
    path = Path(arguments[0])
    path.write_text(in_page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
