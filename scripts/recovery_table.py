"""The table of an experiment about recoveries: `python scripts/recovery_table.py RESULTS.jsonl [screen|leaders]`."""

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
    print(gaps(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "screen"))
