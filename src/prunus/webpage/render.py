"""A plot as SVG that follows the page's colours, and as PNG for papers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError
from prunus.webpage.gather import Run
from prunus.webpage.plots import PRINT, Ink, Plot

INSTALL = "pip install 'prunus[report]'"
WIDE, NARROW = 7.6, 3.7  # inches
# Colours that stand for the page's variables; matplotlib writes them into the SVG as they are.
STANDINS = {
    "#010203": "var(--text)", "#010204": "var(--muted)", "#010205": "var(--line)",
    **{f"#0a0b{index:02x}": f"var(--series-{index})" for index in range(1, 9)},
}  # fmt: skip
PAGE = Ink("#010203", "#010204", "#010205", tuple(colour for colour in STANDINS if colour.startswith("#0a0b")))
FONT = re.compile(r"(font(?:-family)?:\s*[^;\"]*?)'[^;\"]*(?=[;\"])")


def svg(plot: Plot, runs: Sequence[Run], *, narrow: bool) -> str:
    """The `<svg>` element, to be put into a page that has the variables; no id in it occurs in another plot.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    stream = io.StringIO()
    prefix = f"{plot.name}-{'narrow' if narrow else 'wide'}"
    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix}
    options = {"format": "svg", "transparent": True, "metadata": {"Date": None, "Creator": None}}
    save(plot, runs, PAGE, stream, narrow=narrow, settings=settings, **options)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in (
        (r"<metadata>.*?</metadata>", ""),
        (r'^(<svg[^>]*?) height="[^"]*"', r"\1"),  # the viewBox keeps the shape
        (r'^(<svg[^>]*?) width="[^"]*"', r"\1"),
        (r'\bid="([^"]*)"', rf'id="{prefix}-\1"'),
        (r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)"),
        (r'href="#([^"]*)"', rf'href="#{prefix}-\1"'),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = FONT.sub(r"\1inherit", text)
    for colour, variable in STANDINS.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{plot.title}" ', 1)


def png(plot: Plot, runs: Sequence[Run], path: Path) -> None:
    """The wide plot on white, 220 dots an inch; written beside, then renamed."""
    beside = path.with_name(f".{path.name}.partial")
    options = {"format": "png", "dpi": 220, "facecolor": "white", "metadata": {"Software": None}}
    save(plot, runs, PRINT, beside, narrow=False, settings={}, **options)
    beside.replace(path)


def save(
    plot: Plot, runs: Sequence[Run], ink: Ink, target: Any, *, narrow: bool, settings: dict[str, Any], **options: Any
) -> None:
    """Draw and write; matplotlib's global settings are as before when this returns.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise RecipeError(f"The page needs matplotlib, which is not installed: {INSTALL}") from problem
    chosen: Any = {**style(ink), **settings}  # matplotlib types the names of its settings one by one
    with mpl.rc_context(chosen):
        # No pyplot: it would keep figures, and choose a backend that may want a display.
        figure = Figure((NARROW if narrow else WIDE, plot.height(runs, narrow)), layout="constrained")
        plot.draw(figure, runs, ink, narrow)
        figure.savefig(target, **options)


def style(ink: Ink) -> dict[str, Any]:
    """Matplotlib's settings: quiet axes, no box, a light grid behind. Names may hold `$`, so no text is mathematics."""
    return {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "text.parse_math": False,
        "text.color": ink.text, "axes.labelcolor": ink.muted, "axes.edgecolor": ink.grid, "axes.linewidth": 1.0,
        "xtick.color": ink.grid, "ytick.color": ink.grid, "xtick.labelcolor": ink.muted, "ytick.labelcolor": ink.muted,
        "xtick.minor.visible": False, "ytick.minor.size": 0, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": ink.grid, "grid.linewidth": 0.8,
        "lines.solid_capstyle": "round", "axes.facecolor": "none", "axes.unicode_minus": True,
    }  # fmt: skip
