"""A series of numbers from a log: CSV with a header, or one JSON object a line."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import FormatError, near

LEAST = 40  # values: 30 to learn from and 10 to be tested on


@dataclass(frozen=True)
class Series:
    """One column of a log.

    Attributes:
        column: its name.
        values: float64 [rows], finite.
        every: steps between two rows; 1 where the log names no steps.
        last: step of the last row; None likewise.
        rates: learning rates of the rows, float64 [rows], or None.
    """

    column: str
    values: np.ndarray
    every: float
    last: float | None
    rates: np.ndarray | None


def read_series(path: Path, column: str | None = None) -> Series:
    """The column of a log, checked: numbers at equal distances, finite, not constant, enough of them.

    Rows in which the column is empty are left out, as in a log that holds a value every 50 steps; what remains must
    still lie at equal distances.

    Args:
        path: .csv, .jsonl or .json lines.
        column: None: `loss`, or the only column besides step, seconds and lr.

    Raises:
        FormatError: with the row and what to do.
    """
    rows = _rows(path)
    name = _column(rows, column, path)
    numbers = [(row, _number(values.get(name), name, row, path)) for row, values in enumerate(rows, 1)]
    kept = [(row, value) for row, value in numbers if value is not None]
    if len(kept) < LEAST:
        raise FormatError(
            f"{path}: {name} has {len(kept)} values, too few to forecast; at least {LEAST} are needed "
            f"({LEAST - len(kept)} more), and some hundreds are better."
        )
    values = np.array([value for _, value in kept])
    if (values == values[0]).all():
        raise FormatError(f"{path}: {name} is {values[0]:g} in all rows; a constant needs no forecast.")
    steps = [_number(rows[row - 1].get("step"), "step", row, path) for row, _ in kept]
    every, last = _distances(steps, kept, len(rows), name, path)
    rates = [_number(rows[row - 1].get("lr"), "lr", row, path) for row, _ in kept]
    known = None if any(rate is None for rate in rates) else np.array(rates, dtype=float)
    return Series(name, values, every, last, known)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise FormatError(f"{path} cannot be read as a log ({problem}).") from problem
    if text.lstrip().startswith("{"):
        return _json_rows(text, path)
    if text.lstrip().startswith("["):
        raise FormatError(f"{path} is one JSON list; write one object a line, or a CSV file with a header.")
    try:
        rows = [dict(row) for row in csv.DictReader(text.splitlines(), strict=True)]
    except csv.Error as problem:
        raise FormatError(f"{path} is not a CSV file with a header ({problem}).") from problem
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise FormatError(f"{path}: row {number} does not have as many fields as the header.")
    if not rows:
        raise FormatError(f"{path} has no rows below its header.")
    return rows


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise FormatError(f"{path}: line {number} is no JSON ({problem}).") from problem
        if not isinstance(row, dict):
            raise FormatError(f"{path}: line {number} is no JSON object.")
        rows.append(row)
    return rows


def _column(rows: list[dict[str, Any]], wanted: str | None, path: Path) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is not None:
        if wanted not in names:
            raise FormatError(f"{path} has no column {wanted!r}.{near(wanted, names)}")
        return wanted
    free = [name for name in names if name not in ("step", "seconds", "lr")]
    if "loss" in free:
        return "loss"
    if len(free) == 1:
        return free[0]
    raise FormatError(f"{path} has several columns; name one with --column: {', '.join(free)}.")


def _number(value: Any, name: str, row: int, path: Path) -> float | None:
    """A finite number, or None for an empty field."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError) as problem:
        raise FormatError(f"{path}: {name} is {value!r} in row {row}, which is no number.") from problem
    if not math.isfinite(number):
        raise FormatError(f"{path}: {name} is {number} in row {row}; cut the log before it, or mend the row.")
    return number


def _distances(
    steps: list[float | None], kept: list[tuple[int, float]], rows: int, name: str, path: Path
) -> tuple[float, float | None]:
    """Steps between rows, and the last step."""
    named = [step for step in steps if step is not None]
    places = named if len(named) == len(kept) else [float(row) for row, _ in kept]
    gaps = np.diff(places)
    wrong = np.flatnonzero(~np.isclose(gaps, np.median(gaps)))
    if len(wrong):
        first = int(wrong[0])
        what = "step" if places is named else "row"
        raise FormatError(
            f"{path}: {name} has a gap: after {what} {places[first]:g} comes {places[first + 1]:g}, elsewhere they are "
            f"{np.median(gaps):g} apart. Fill it, or cut the log so that {what}s are equally far apart."
        )
    if gaps[0] <= 0:
        raise FormatError(f"{path}: the steps do not rise; is this one run?")
    return (float(gaps[0]), named[-1]) if places is named else (float(gaps[0]), None)
