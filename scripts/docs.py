"""Regenerate what README.md and docs/ say about the code and its measurements.

    python scripts/docs.py            write
    python scripts/docs.py --check    only compare; exit code 1 if something is out of date

A generated part stands between `<!-- generated: NAME WORDS -->` and `<!-- /generated -->`; NAME is a row of `PARTS`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from compare_table import compared
from families_table import families
from finals_table import finals
from judging_table import factual, probed, stationary, tasks
from recovery_table import recovered, recovered_texts
from results_table import choices, measured, methods, settings
from speed_table import dola_overhead, frontier, greedy, pattern_cost, speed

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- /generated -->)", re.DOTALL)


def example() -> str:
    """What the commands of README's example printed when `make example` last ran them."""
    path = ROOT / "docs" / "example.txt"
    return f"```console\n{path.read_text('utf-8').strip()}\n```" if path.is_file() else "*Not run yet: `make example`.*"


# Name in a marker -> what renders it, given the other words of the marker.
PARTS: dict[str, Callable[..., str]] = {
    "methods": methods,
    "choices": choices,
    "example": example,
    "settings": settings,
    "measured": measured,
    "families": families,
    "finals": finals,
    "compared": compared,
    "speed": speed,
    "greedy": greedy,
    "pattern_cost": pattern_cost,
    "frontier": frontier,
    "dola_overhead": dola_overhead,
    "recovered": recovered,
    "recovered_texts": recovered_texts,
    "tasks": tasks,
    "stationary": stationary,
    "factual": factual,
    "probed": probed,
}


def render(text: str) -> str:
    """The document with every generated part made anew.

    Raises:
        KeyError: a marker names no part.
    """

    def part(match: re.Match[str]) -> str:
        name, *words = match[2].split()
        return f"{match[1]}{PARTS[name](*words).strip()}\n{match[3]}"

    return MARKED.sub(part, text)


def main(arguments: list[str]) -> int:
    """Write or check all documents; returns the exit code."""
    stale = []
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]:
        before = path.read_text("utf-8")
        after = render(before)
        if after != before:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in arguments:
                path.write_text(after, "utf-8")
    if "--check" in arguments and stale:
        print(f"Out of date: {', '.join(stale)}. Run `make docs`.")
        return 1
    print(f"Written: {', '.join(stale) or 'nothing, all is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
