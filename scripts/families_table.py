"""The table of model families, from the rows that `make families` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROWS = Path(__file__).resolve().parent.parent / "docs" / "families.json"
HEAD = "| family | blocks | matrices | streamed = resident | sparsity reached | reload: largest relative difference |"
RULE = "|---|--:|--:|---|--:|--:|"


def families() -> str:
    """Two tables: the families that are pruned, and those that are refused, each with its sentence."""
    if not ROWS.is_file():
        return "*Not measured yet: `make families` writes `docs/families.json`.*"
    rows: dict[str, dict[str, Any]] = json.loads(ROWS.read_text("utf-8"))
    done = {name: row for name, row in rows.items() if "refused" not in row}
    refused = {name: row for name, row in rows.items() if "refused" in row}
    lines = [f"{len(done)} families are pruned, {len(refused)} are refused.", "", HEAD, RULE]
    lines += [_done(name, row) for name, row in sorted(done.items())]
    if refused:
        lines += ["", "| refused | because |", "|---|---|"]
        lines += [f"| {name} | {_cell(row['refused'])} |" for name, row in sorted(refused.items())]
    warned = {name: row["warnings"] for name, row in sorted(done.items()) if row.get("warnings")}
    if warned:
        lines += ["", "Warnings that these families give:", ""]
        lines += [f"- {name}: {_cell(' '.join(texts))}" for name, texts in warned.items()]
    return "\n".join(lines)


def _done(name: str, row: Mapping[str, Any]) -> str:
    same = "bit for bit" if row["streamed_equals_resident"] else "**no**"
    difference = f"{row['reload_difference']:.1e}" if row["reload_difference"] else "0"
    return f"| {name} | {row['blocks']} | {row['matrices']} | {same} | {row['sparsity']:.4f} | {difference} |"


def _cell(text: str) -> str:
    """Text that cannot end a cell."""
    return " ".join(text.replace("|", "\\|").split())
