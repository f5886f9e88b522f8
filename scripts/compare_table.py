"""A comparison's table.csv, kept in benchmarks/results, as Markdown."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def compared(name: str) -> str:
    """Recipe, share removed, perplexity, its ratio to the dense model's, and accuracies of tasks, a row a recipe."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    tasks = [key.removesuffix(".dense") for key in rows[0] if key.endswith(".dense")]
    heads = ["recipe", "removed", "perplexity", "× dense", *tasks]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in {row["dense_perplexity"]: row for row in rows}.values():
        known = [f"{float(row[f'{task}.dense']):.3f}" for task in tasks]
        lines.append(_line(["dense", "", f"{float(row['dense_perplexity']):,.2f}", "1.00", *known]))
    for row in rows:
        removed, perplexity, ratio = (float(row[key]) for key in ("reached", "perplexity", "ratio"))
        found = [f"{float(row[f'{task}.acc']):.3f} ± {float(row[f'{task}.stderr']):.3f}" for task in tasks]
        lines.append(_line([row["name"], f"{100 * removed:.1f} %", f"{perplexity:,.2f}", f"{ratio:,.2f}", *found]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
