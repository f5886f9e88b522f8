"""The tables of experiments about recoveries: `python scripts/recovery_table.py FILE.jsonl [screen|leaders|texts]`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results"

Row = dict[str, Any]


def recovered(name: str, stage: str) -> str:
    """The table of a file in experiments/results, for a generated part of a document."""
    path = RESULTS / f"{name}.jsonl"
    return gaps(path, stage) if path.is_file() else "*Not run yet: `experiments/recover.py`.*"


def recovered_texts(name: str) -> str:
    """The table of `judged`, for a generated part of a document."""
    path = RESULTS / f"{name}.jsonl"
    return judged(path) if path.is_file() else "*Not run yet: `experiments/recover.py`.*"


def judged(path: Path) -> str:
    """Every run of a file with its perplexities on all texts, and the per cent of the gap to dense that it removed.

    A line for a run, cases together in the order of the file; a run that was refused or died has the reason.
    """
    rows: list[Row] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    dense = next(row for row in rows if row["case"] == "dense")["perplexity"]
    given = {row["case"]: row["perplexity"] for row in rows if row["recovery"] == "none"}
    lines = [f"| pruned by | recovery | tokens | CPU s | {' | '.join(dense)} |", "|---" * (len(dense) + 4) + "|"]
    lines.append(f"| not at all | | | | {' | '.join(f'{value:.2f}' for value in dense.values())} |")
    for case in (case for case in given if case != "dense"):
        for row in (row for row in rows if row["case"] == case):
            cells = [_gap(row, text, given[case].get(text), whole) for text, whole in dense.items()]
            recovery = "" if row["recovery"] == "none" else f"`{row['recovery']}`"
            lines.append(f"| {case} | {recovery} | {_tokens(row)} | {_cpu(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap(row: Row, text: str, pruned: float | None, dense: float) -> str:
    """Perplexity on a text, and how much of the gap is gone; why there is none."""
    if "perplexity" not in row:
        return str(row.get("refused", "apart"))
    value = row["perplexity"].get(text)
    if value is None or not math.isfinite(value):
        return "" if value is None else "inf"
    if row["recovery"] == "none" or pruned is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({100 * (pruned - value) / (pruned - dense):.0f} %)"


def _tokens(row: Row) -> str:
    """Tokens that were learnt from, each as often as it was seen; empty where nothing was learnt."""
    if "sequences" not in row:
        return ""
    steps = row["facts"]["steps"]
    return f"{(row['sequences'] if steps is None else steps * row['asked']['batch']) * row['length']:,}"


def _cpu(row: Row) -> str:
    return f"{row['seconds']['cpu']:.0f}" if "trainable" in row else ""


def gaps(path: Path, stage: str) -> str:
    """Per cent of the gap between pruned and dense that each recovery removes; the best of each case in bold.

    Cases of which some runs are missing are left out. Rows are recoveries and columns cases, both in the order of the
    file; the median CPU time is over a row's cases.
    """
    rows = [row for line in path.read_text("utf-8").splitlines() if (row := json.loads(line))["stage"] == stage]
    by = {(row["case"], row["recovery"]): row for row in rows}
    dense = _first(by["dense", "none"])
    everything = {way for _, way in by} - {"imp"}  # which belongs to magnitude pruning alone
    cases = [case for case, way in by if way == "none" and everything <= {one for other, one in by if other == case}]
    removed = {
        (case, way): (_first(by[case, "none"]) - _first(row)) / (_first(by[case, "none"]) - dense)
        for (case, way), row in by.items()
        if case in cases and way != "none" and "perplexity" in row
    }
    best = {case: max((share for (one, _), share in removed.items() if one == case), default=None) for case in cases}
    lines = [f"| | trained | CPU s | {' | '.join(cases)} |", "|---" * (len(cases) + 3) + "|"]
    lines.append(_line("perplexity, pruned", "", "", [f"{_first(by[case, 'none']):.2f}" for case in cases]))
    for way in dict.fromkeys(way for _, way in by if way != "none"):
        own = [by[case, way] for case in cases if "trainable_share" in by.get((case, way), {})]
        cells = [_cell(by.get((case, way)), removed.get((case, way)), best[case]) for case in cases]
        lines.append(_line(f"`{way}`", *_costs(own), cells))
    winners = {case: _first(by[case, way]) for (case, way), share in removed.items() if share == best[case]}
    lines.append(
        _line("perplexity, best", "", "", [f"{winners[case]:.2f}" if case in winners else "" for case in cases])
    )
    return "\n".join([*lines, "", f"Dense: {dense:.2f}."])


def _first(row: Row) -> float:
    """Perplexity on the first text; infinite if it is no number."""
    value = next(iter(row["perplexity"].values()))
    return value if value is not None and math.isfinite(value) else math.inf


def _cell(row: Row | None, share: float | None, best: float | None) -> str:
    """`-`: refused; `apart`: an adapter that is not merged; empty: not run."""
    if row is None:
        return ""
    if share is None:
        return "apart" if "facts" in row else "-"
    return f"**{100 * share:.0f}**" if share == best else f"{100 * share:.0f}"


def _costs(rows: list[Row]) -> tuple[str, str]:
    """Share of the model that is trained, in the first case, and the median CPU time."""
    if not rows:
        return "", ""
    spent = sorted(row["seconds"]["cpu"] for row in rows)
    return f"{100 * rows[0]['trainable_share']:.2f} %", f"{spent[len(spent) // 2]:.0f}"


def _line(head: str, share: str, spent: str, cells: list[str]) -> str:
    return f"| {head} | {share} | {spent} | {' | '.join(cells)} |"


if __name__ == "__main__":
    stage = sys.argv[2] if len(sys.argv) > 2 else "screen"
    print(judged(Path(sys.argv[1])) if stage == "texts" else gaps(Path(sys.argv[1]), stage))
