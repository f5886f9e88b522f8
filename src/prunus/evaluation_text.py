"""An evaluation as text for people: perplexities side by side, tasks with what is noise and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.text import large, table, wrap

Result = Mapping[str, Any]


def evaluate_text(result: Result) -> str:
    """Perplexities and scores beside the dense model's, with all that they depend on."""
    measured = [result["baseline"], result] if result.get("baseline") else [result]
    parts = []
    if "perplexity" in result:
        parts += perplexities(measured)
    if result.get("tasks"):
        parts += scores(result)
    parts += [f"{item['model']}:\n{wrap(item['sample'], '    ')}" for item in measured if item.get("sample")]
    return "\n\n".join([*parts, *(wrap(f"Note: {note}") for note in result.get("notes", ()))])


def perplexities(measured: Sequence[Result]) -> list[str]:
    """The table of perplexities and the lines below it; the dense model's first, if there is one."""
    result = measured[-1]
    rows = [(str(item["model"]), large(item["perplexity"]), f"{item['seconds']:,.1f}") for item in measured]
    bos = {True: ", BOS at the head of each", False: ", no BOS"}[bool(result["bos"])] if "bos" in result else ""
    windows = f"{result['windows']} windows of {result['length']} tokens of {result['text']}"
    below = [f"{windows}{bos}, {result.get('dtype', 'float32')}{engine(result)}. Lower is better."]
    if len(measured) == 2:
        ratio = result["perplexity"] / measured[0]["perplexity"]
        below.append(f"Perplexity is {f'{ratio:,.3f}' if ratio < 1e6 else large(ratio)} times the baseline's.")
    return [table(("model", "perplexity", "seconds"), rows, right=(1, 2)), wrap(" ".join(below))]


def engine(result: Result) -> str:
    """What computed the model, where that is not what computed its baseline."""
    name = result.get("engine", "transformers")
    return "" if name == "transformers" else f", {Path(str(result['model'])).name} by the {name} engine"


def scores(result: Result) -> list[str]:
    """The table of tasks, groups below, and the lines that say what the columns are."""
    dense = result.get("baseline") or {}
    rows = [row(name, one, dense.get("tasks", {}).get(name)) for name, one in result["tasks"].items()]
    rows += [
        row(f"{name} (mean of {len(one['tasks'])})", one, dense.get("groups", {}).get(name))
        for name, one in result.get("groups", {}).items()
    ]
    asked = result["asked"]
    how_many = "all items" if asked["limit"] is None else f"the first {asked['limit']} items of each"
    below = f"{how_many}, lm-eval {asked['lm_eval']}{engine(result)}; ± one standard error"
    if not dense:
        return [table(("task", "items", "acc", "acc_norm"), [line[:2] + line[3:5] for line in rows]), wrap(f"{below}.")]
    below += (
        "; change in acc with its 95 % interval, paired item by item. Worse or better: p below 0.05 (McNemar's exact "
        "test; bootstrap for means)."
    )
    head = ("task", "items", "dense", "acc", "acc_norm", "change in points", "verdict")
    return [table(head, rows, right=(1,)), wrap(below[0].upper() + below[1:])]


def row(name: str, one: Result, dense: Result | None) -> tuple[str, ...]:
    """One task or group as cells: name, items, dense acc, acc, acc_norm, change, verdict."""
    versus = one.get("versus")
    change = verdict = ""
    if versus is not None:
        low, high = 100 * versus["low"], 100 * versus["high"]
        change = f"{100 * versus['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        verdict = versus["verdict"]
    value, norm = _value(one), number(one.get("acc_norm"), one.get("acc_norm_stderr"))
    return name, f"{one.get('items', '')}", _value(dense) if dense else "", value, norm, change, verdict


def number(value: float | None, error: float | None) -> str:
    """`0.584 ±0.010`; empty where there is no number."""
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _value(one: Result) -> str:
    if one.get("acc") is None and one.get("metric"):
        return f"{one['metric']} {number(one['metrics'][one['metric']], one['stderr'])}"
    return number(one.get("acc"), one.get("stderr"))
