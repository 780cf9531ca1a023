"""A Markdown table of what ``peers.py --json`` wrote, for the README.

python benchmarks/table.py peers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SYSTEMS = {
    "ours-1": "ours, 1 stage",
    "ours-2": "ours, 2 stages",
    "mlx_lm": "`mlx_lm.server`",
    "mlx_lm-pipeline": "`mlx_lm.server --pipeline`, 2 ranks",
}


def table(document: dict[str, Any]) -> str:
    """One row per scenario: tokens per second, or the time to the first token where that is the point."""
    machine = document["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; mlx {document['versions']['mlx']}, "
        f"mlx-lm {document['versions']['mlx-lm']}; commit {document['commit']}; `{document['command']}`; medians.",
        "",
        "| scenario | " + " | ".join(SYSTEMS.values()) + " |",
        "|---|" + "---:|" * len(SYSTEMS),
    ]
    for result in document["results"]:
        field, unit = ("ttft_ms", "ms") if result["scenario"] == "prefill" else ("tokens_per_second", "tok/s")
        cells = [_cell(result["medians"].get(system, {}).get(field), unit) for system in SYSTEMS]
        lines.append(f"| {result['scenario']}, {result['load']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:,.1f} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
