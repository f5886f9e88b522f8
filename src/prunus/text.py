"""Plain text for terminals: tables, facts, numbers with units."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence


def percent(share: float) -> str:
    """`0.5` -> `50.00 %`."""
    return f"{100 * share:.2f} %"


def bytes_text(count: float) -> str:
    """`812_345_678` -> `812 MB`; steps of 1000, as disks and `ls -h --si` count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def large(value: float) -> str:
    """`1234.5` -> `1,234.50`; from a million on in powers of ten."""
    return f"{value:,.2f}" if abs(value) < 1e6 else f"{value:.1e}"


def width() -> int:
    """Columns to write in: those of the terminal, between 60 and 120; 80 where there is none."""
    return min(120, max(60, shutil.get_terminal_size((80, 24)).columns))


def printable(text: str) -> str:
    """Control characters as `?`: names come from files that anybody may have written, and a terminal obeys them."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def wrap(text: str, indent: str = "") -> str:
    """Text broken at words to fit the terminal."""
    text = printable(" ".join(text.split()))
    fill = textwrap.TextWrapper(
        width(), initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return fill.fill(text)


def pairs(facts: Mapping[str, str]) -> str:
    """`name  text` lines, wrapped under themselves; names without text are left out."""
    facts = {name: text for name, text in facts.items() if text}
    column = max((len(name) for name in facts), default=0) + 4
    lines = [wrap(text, " " * column).lstrip().join([f"  {name}".ljust(column), ""]) for name, text in facts.items()]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell, two blanks between; the columns in `right` aligned to the right."""
    cells = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = ["-" * wide for wide in widths]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [
            cell.rjust(wide) if column in right else cell.ljust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
