"""A comparison's table.csv, kept in benchmarks/results, as Markdown."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def compared(name: str) -> str:
    """Recipe, share removed, perplexity and its ratio to the dense model's, a row a recipe."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = ["| recipe | removed | perplexity | × dense |", "|---|---:|---:|---:|"]
    dense = dict.fromkeys(row["dense_perplexity"] for row in rows)
    lines += [f"| dense | | {float(value):,.2f} | 1.00 |" for value in dense]
    for row in rows:
        removed, perplexity, ratio = (float(row[key]) for key in ("reached", "perplexity", "ratio"))
        lines.append(f"| {row['name']} | {100 * removed:.1f} % | {perplexity:,.2f} | {ratio:,.2f} |")
    return "\n".join(lines)
