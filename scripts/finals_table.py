"""The finals of the experiment about presets, kept in experiments/results, as Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results"


def finals(name: str, base: str) -> str:
    """Perplexity, the paired difference to a base row window by window, and processor time, the best first.

    Args:
        name: of the result file, without `.jsonl`.
        base: words of the row that the others are compared with, joined by `_`.
    """
    rows = {row["name"]: row for row in map(json.loads, (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines())}
    dense = rows.pop("dense")["perplexity"]["text"]
    first = rows[base.replace("_", " ")]
    lines = [
        "| | perplexity | × base | nats, paired | processor seconds |",
        "| --- | --: | --: | --: | --: |",
        f"| dense | {dense:.2f} | | | |",
    ]
    for row in sorted(rows.values(), key=lambda row: row["perplexity"]["text"]):
        ratio = row["perplexity"]["text"] / first["perplexity"]["text"]
        seconds = row["cpu_seconds"]["total"]
        cells = [row["name"], f"{row['perplexity']['text']:.1f}", f"{ratio:.2f}", _gap(row, first), f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap(row: dict[str, Any], base: dict[str, Any]) -> str:
    """Mean of the differences of the windows' losses, and its standard error."""
    if row is base:
        return "base"
    gaps = [a - b for a, b in zip(row["windows"]["text"], base["windows"]["text"], strict=True)]
    return f"{mean(gaps):+.3f} ± {stdev(gaps) / math.sqrt(len(gaps)):.3f}"
