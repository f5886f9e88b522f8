"""The rows of a comparison as one table, for people and as CSV: the same, however often the work was interrupted."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from prunus.text import large, table, wrap

# No times and no folders: they differ from call to call, and the table must not.
COLUMNS = (
    "name", "model", "method", "metric", "update", "pattern", "allocation", "sparsity", "reached", "perplexity",
    "ratio", "loss", "loss_stderr", "dense_perplexity", "calibration_sha256", "status", "why",
)  # fmt: skip


def line(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row in numbers and words.

    Args:
        row: what lies in a row's `result.json`.

    Returns:
        `COLUMNS`, and for each task and group `tasks.NAME` with acc, stderr, dense and verdict.
    """
    recipe, pruned, found = row["recipe"], row.get("prune") or {}, row.get("evaluate") or {}
    dense, part = found.get("baseline") or {}, recipe["prune"]
    scores = {**found.get("tasks", {}), **found.get("groups", {})}
    below = {**dense.get("tasks", {}), **dense.get("groups", {})}
    ratio = found["perplexity"] / dense["perplexity"] if "perplexity" in found and "perplexity" in dense else None
    return {
        "name": row["name"],
        "model": recipe["model"],
        **{key: part[key] for key in ("method", "metric", "update", "pattern", "allocation", "sparsity")},
        "reached": pruned.get("sparsity", {}).get("reached"),
        **{key: found.get(key) for key in ("perplexity", "loss", "loss_stderr")},
        "ratio": ratio,
        "dense_perplexity": dense.get("perplexity"),
        "calibration_sha256": (pruned.get("calibration") or {}).get("sha256"),
        "status": row["status"],
        "why": row.get("why") or "; ".join(found.get("notes", ())) or None,
        "tasks": {
            name: {
                "acc": one.get("acc"),
                "stderr": one.get("stderr"),
                "dense": below.get(name, {}).get("acc"),
                "verdict": (one.get("versus") or {}).get("verdict"),
            }
            for name, one in scores.items()
        },
    }


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated, one row a recipe, tasks as three columns each; numbers in full."""
    names = task_names(lines)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    parts = ("acc", "stderr", "dense")
    writer.writerow([*COLUMNS, *(f"{name}.{part}" for name in names for part in parts)])
    for one in lines:
        cells = [one[column] for column in COLUMNS]
        cells += [one["tasks"].get(name, {}).get(part) for name in names for part in parts]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return stream.getvalue()


def compare_text(result: Mapping[str, Any]) -> str:
    """The table for a terminal, reasons below it, and where everything lies."""
    lines = result["rows"]
    names = task_names(lines)
    rows = dense_rows(lines, names)
    rows += [
        (
            one["name"],
            "" if one["reached"] is None else f"{100 * one['reached']:.1f} %",
            "" if one["perplexity"] is None else large(one["perplexity"]),
            "" if one["ratio"] is None else large(one["ratio"]),
            *(_score(one["tasks"].get(name)) for name in names),
            one["status"],
        )
        for one in lines
    ]
    head = ("recipe", "removed", "perplexity", "x dense", *names, "status")
    parts = [table(head, rows, right=range(1, 4 + len(names)))]
    parts += [wrap(f"{one['name']}: {one['why']}") for one in lines if one["why"]]
    parts += [wrap(note) for note in result["notes"]]
    where = [result["table"], *([result["report"]] if result["report"] else [])]
    return "\n\n".join([*parts, "\n".join(["Written:", *(f"  {place}" for place in where)])])


def dense_rows(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The dense models as cells, each once; one that was asked other items stands in a row of its own."""
    found: dict[tuple[Any, ...], None] = {}
    # Rows that ended before their tasks know nothing of the dense model's.
    for one in sorted(lines, key=lambda one: not one["tasks"]):
        scores = tuple((one["tasks"].get(name) or {}).get("dense") for name in names)
        key = (one["model"], one["dense_perplexity"])
        if one["tasks"] or not any(other[:2] == key for other in found):
            found[(*key, *scores)] = None
    return [
        (
            f"dense {model}",
            "",
            "" if perplexity is None else large(perplexity),
            "" if perplexity is None else "1.00",
            *("" if score is None else f"{score:.3f}" for score in scores),
            "",
        )
        for model, perplexity, *scores in found
        if perplexity is not None or any(score is not None for score in scores)
    ]


def task_names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tasks and groups of all rows, in the order of the first that has them."""
    return list(dict.fromkeys(name for one in lines for name in one["tasks"]))


def _score(one: Mapping[str, Any] | None) -> str:
    return "" if one is None or one["acc"] is None else f"{one['acc']:.3f}"
