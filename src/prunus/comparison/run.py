"""The comparison: the dense models first, then row after row, then the table. Interrupted, it goes on where it was."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.comparison.grid import Entry
from prunus.comparison.row import KEY, RESULT, Order, ask_dense, failed, fault, finished, make, read, tidy, write
from prunus.comparison.shared import Shared
from prunus.comparison.table import csv_text, line
from prunus.errors import PrunusError, RecipeError
from prunus.progress import Progress, Silent

RECORD, TABLE, LOCK = "comparison.json", "table.csv", ".lock"


def compare(
    entries: Sequence[Entry],
    out: Path,
    *,
    keep: bool = False,
    restart: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every recipe and set the results side by side in `out`.

    `out` holds comparison.json, table.csv, report.html with its plots, dense/ (the dense models' answers) and runs/
    (a folder of data for each row). Called again with other recipes it keeps the rows that are still asked for.

    Args:
        entries: from `grid.entries`.
        out: a new folder, or that of an earlier comparison.
        keep: leave every pruned checkpoint in its row's folder.
        restart: make every row anew.
        ray: address of a Ray cluster whose machines all see `out`; rows run on it, as many at a time as it has room.
        progress: told about every step.

    Returns:
        out, rows (see `table.line`; a row that failed has its reason under `why`), counts by status, table, report
        (path, or None where matplotlib is not installed) and notes.

    Raises:
        RecipeError: `out` holds something else or another process compares in it.
        PrunusError: no row could be made; the reasons are listed.
    """
    progress, shared = progress or Silent(), Shared()
    out = out.resolve()
    with owning(out):
        orders, rows = plan(entries, out, keep, shared, restart)
        missing = [order for order in orders if order.name not in rows]
        asked = {order.dense: order for order in missing}
        recipes = {entry.name: entry.recipe for entry in entries}
        for file, order in asked.items():
            try:
                ask_dense(recipes[order.name], Path(file), shared, Named(progress, "dense"))
            except Exception as problem:  # the rows of other models must not be lost with these
                # Every row that would stand beside this dense model fails by the same reason.
                why = str(problem) if isinstance(problem, PrunusError) else fault(problem, Path(file).parent)
                rows |= {one.name: failed(one, why) for one in missing if one.dense == file}
        left = [order for order in missing if order.name not in rows]
        rows |= made(left, shared, progress, ray)
        return end(out, [rows[order.name] for order in orders])


def plan(
    entries: Sequence[Entry], out: Path, keep: bool, shared: Shared, restart: bool
) -> tuple[list[Order], dict[str, dict[str, Any]]]:
    """The orders, and the rows that earlier calls made; a row whose inputs cannot even be found has failed already."""
    orders: list[Order] = []
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        folder = out / "runs" / entry.name
        recipe = entry.recipe.resolved()
        try:
            key, dense = shared.row_key(entry.recipe), shared.dense_key(entry.recipe)
        except PrunusError as refusal:
            order = Order(entry.name, recipe, str(folder), "", "", keep)
            rows[entry.name] = failed(order, str(refusal))
        else:
            order = Order(entry.name, recipe, str(folder), str(out / "dense" / f"{dense}.json"), key, keep)
            before = None if restart else finished(order)
            if before is not None and read(Path(order.dense)):
                tidy(folder, keep)  # what a call killed at its last step left
                rows[entry.name] = before
            elif restart:
                # Both: a call that ends before this row is made must not leave the old one to the next call.
                (folder / RESULT).unlink(missing_ok=True)
                (folder / KEY).unlink(missing_ok=True)
        orders.append(order)
    if restart:
        for file in {order.dense for order in orders if order.dense}:
            Path(file).unlink(missing_ok=True)
    record = [
        {"name": order.name, "dense": order.dense, "key": order.key, "recipe": dict(order.recipe)} for order in orders
    ]
    write(out / RECORD, {"format": 1, "rows": record})
    return orders, rows


def made(orders: Sequence[Order], shared: Shared, progress: Progress, ray: str | None) -> dict[str, dict[str, Any]]:
    """Make the rows, here one by one or on a cluster."""
    if ray is not None:
        from prunus.comparison.cluster import make_all

        return make_all(orders, ray, progress)
    rows = {}
    for number, order in enumerate(orders, start=1):
        rows[order.name] = make(order, shared, Named(progress, f"{number}/{len(orders)} {order.name}:"))
        if rows[order.name]["status"] != "done":
            progress.warn(f"{order.name}: {rows[order.name]['why']}")
    return rows


def end(out: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the table and the report; refuse if there is nothing to show.

    Raises:
        PrunusError: every row failed.
    """
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "collapsed", "failed")}
    if counts["failed"] == len(rows):
        reasons = dict.fromkeys(str(row["why"]) for row in rows)
        raise PrunusError("No recipe could be run:\n" + "\n".join(f"{reason}" for reason in reasons))
    lines = [line(row) for row in rows]
    beside = out / f"{TABLE}.partial"
    beside.write_text(csv_text(lines), "utf-8")
    beside.replace(out / TABLE)
    notes: list[str] = []
    result = {"out": str(out), "rows": lines, "counts": counts, "table": str(out / TABLE), "report": None}
    record = read(out / RECORD)
    # A row that could not begin has no folder to say why in; an older row of its name may have one.
    failures = {row["name"]: row["why"] for row in rows if row["status"] == "failed"}
    known = [{**row, "failed": failures.get(row["name"])} for row in record["rows"]]
    write(out / RECORD, {**record, "rows": known, "table": lines})
    try:
        from prunus.webpage.write import write_page

        result["report"] = write_page([out], out / "report.html")["page"]
    except RecipeError as missing:
        notes.append(str(missing))
    return {**result, "notes": notes}


@contextmanager
def owning(out: Path) -> Iterator[None]:
    """Make `out` and be its only writer.

    Raises:
        RecipeError: it holds something that is no comparison, or another process writes it.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file; choose a folder for the comparison.")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file() and not (out / LOCK).is_file():
        raise RecipeError(f"{out} holds files but no comparison; choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as problem:
        raise RecipeError(f"{out} cannot be written: {problem.strerror}. Choose another folder.") from problem
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"Another prunus process compares in {out}. Wait for it, or choose another.") from None
        yield


@dataclass
class Named:
    """A progress whose stages begin with the name of the row."""

    progress: Progress
    name: str

    def stage(self, name: str, total: int) -> None:
        """As `Progress.stage`."""
        self.progress.stage(f"{self.name} {name}", total)

    def advance(self, note: str = "", error: float | None = None) -> None:
        """As `Progress.advance`."""
        self.progress.advance(note, error)

    def warn(self, text: str) -> None:
        """As `Progress.warn`."""
        self.progress.warn(f"{self.name} {text}")

    def close(self) -> None:
        """As `Progress.close`."""
        self.progress.close()
