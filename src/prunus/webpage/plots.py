"""The plots of a page, by matplotlib: each a function that draws on a figure with the colours it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prunus.webpage.gather import Run

MARKERS = "os^vPX*"
DENSE = "Ddph"  # of the dense models, in the colour of the text
UNIFORM = 1e-3  # spread of sparsities within a run that no plot would show


@dataclass(frozen=True)
class Ink:
    """Colours by their use, as matplotlib writes them."""

    text: str
    muted: str
    grid: str
    series: tuple[str, ...]

    def of(self, index: int) -> str:
        """The colour of a series; they repeat after the last."""
        return self.series[index % len(self.series)]


PRINT = Ink(
    "#1c2024", "#60666d", "#dfe3e8",
    ("#2f6db3", "#c4561c", "#2c8a5c", "#7b52b5", "#b23a5e", "#8a6d10", "#1b8394", "#5b6472"),
)  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One plot of the page.

    Attributes:
        name: of its file, and its anchor.
        title: above it.
        caption: below it: what is seen, and the units.
        draw: draws it: `draw(figure, runs, ink, narrow)`.
        height: in inches, `height(runs, narrow)`; widths are 7.6 and 3.7.
        wanted: whether these runs have what it shows.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Sequence[Run], Ink, bool], None]
    height: Callable[[Sequence[Run], bool], float]
    wanted: Callable[[Sequence[Run]], bool]


def names_of(runs: Sequence[Run]) -> list[str]:
    """The series, in order of appearance; their colours follow this order everywhere."""
    return list(dict.fromkeys(label(run, runs) for run in runs))


def label(run: Run, runs: Sequence[Run]) -> str:
    """The series of a run, with its model where there are several."""
    several = len({one.recipe.get("model") for one in runs}) > 1
    return f"{run.model}: {run.series}" if several else run.series


def share(value: float) -> str:
    """`0.5` -> `50 %`; one digit behind the point where it says something."""
    return f"{round(100 * value, 1):g} %"


def perplexity(figure: Any, runs: Sequence[Run], ink: Ink, narrow: bool) -> None:
    """Perplexity, or with several models its ratio to the dense one's, against the sparsity reached."""
    axes = figure.subplots()
    known = [run for run in runs if run.perplexity is not None and run.reached is not None]
    several = len({run.recipe.get("model") for run in known}) > 1
    for index, name in enumerate(names_of(runs)):
        line = sorted((run for run in known if label(run, runs) == name), key=lambda run: run.reached or 0)
        xs = [100 * (run.reached or 0) for run in line]
        ys = [drawn((run.ratio if several else run.perplexity) or math.nan) for run in line]
        if xs:
            bars = None if several else list(zip(*(spread(run) for run in line), strict=True))
            axes.errorbar(xs, ys, yerr=bars, color=ink.of(index), marker="o", ms=5, lw=1.8, capsize=2.5, label=name)
    values = [drawn((run.ratio if several else run.perplexity) or 1.0) for run in known]
    dense = {run.dense.get("perplexity") for run in known}
    floor = 1.0 if several else next(iter(dense)) if len(dense) == 1 else None
    if floor is not None:
        axes.axhline(floor, color=ink.muted, lw=1.2, ls=(0, (4, 3)))
        axes.annotate(
            f"dense {floor:,.2f}" if not several else "dense", (0.01, floor), xycoords=("axes fraction", "data"),
            xytext=(0, 4), textcoords="offset points", color=ink.muted, fontsize=9,
        )  # fmt: skip
    lowest = min(float(value) for value in (*values, floor) if value)
    if max(values) > 8 * lowest:
        axes.set_yscale("log")
        plain_numbers(axes)
    axes.set_xlabel("weights removed, %")
    axes.set_ylabel("perplexity, times dense" if several else "perplexity")
    legend(figure, axes, narrow)


def drawn(value: float) -> float:
    """What an axis can hold: a loss beyond 709 nats has a perplexity of 1e308, next to which matplotlib overflows."""
    return min(value, 1e100)


def spread(run: Run) -> tuple[float, float]:
    """Half-widths of one standard error of the mean loss, carried over to perplexity."""
    value, error = drawn(run.perplexity or 0.0), run.evaluate.get("loss_stderr") or 0.0
    return value * (1 - math.exp(-error)), drawn(value * math.expm1(min(error, 200)))


def block_errors(figure: Any, runs: Sequence[Run], ink: Ink, narrow: bool) -> None:
    """Relative squared output error of every block, a panel for each series."""
    panels(figure, runs, ink, narrow, lambda block: block.get("error"), "output error", log=True)


def block_sparsities(figure: Any, runs: Sequence[Run], ink: Ink, narrow: bool) -> None:
    """Share of zeros in every block, a panel for each series."""
    panels(figure, runs, ink, narrow, lambda block: 100 * block["sparsity"], "removed, %", log=False)


def panels(
    figure: Any, runs: Sequence[Run], ink: Ink, narrow: bool, value: Callable[[Any], float | None], what: str, *,
    log: bool,
) -> None:  # fmt: skip
    """Values by block, small panels beside or below each other, a line for each run, the sparser the stronger."""
    known = [run for run in runs if run.blocks]
    names = [name for name in names_of(runs) if any(label(run, runs) == name for run in known)]
    rows, columns = grid_of(len(names), narrow)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(names):
            axes.set_visible(False)
            continue
        colour = ink.of(names_of(runs).index(names[number]))
        members = sorted((run for run in known if label(run, runs) == names[number]), key=lambda run: run.reached or 0)
        for place, run in enumerate(members):
            points = [(index, found) for index, block in enumerate(run.blocks) if (found := value(block)) is not None]
            strength = 1.0 if len(members) == 1 else 0.4 + 0.6 * place / (len(members) - 1)
            xs, ys = [index for index, _ in points], [found for _, found in points]
            axes.plot(xs, ys, color=colour, alpha=strength, lw=1.6, marker="o" if len(xs) < 40 else "", ms=3.2)
            if len(members) > 1 and points:
                axes.annotate(
                    share(run.reached or 0), (xs[-1], ys[-1]), xytext=(5, 0), textcoords="offset points", fontsize=8,
                    va="center", color=colour, alpha=strength,
                )  # fmt: skip
        axes.set_title(names[number], loc="left", fontsize=10, color=ink.text)
        axes.margins(x=0.12 if len(members) > 1 else 0.05)
        axes.xaxis.get_major_locator().set_params(integer=True)
    found = [one for run in known for block in run.blocks if (one := value(block)) is not None and one > 0]
    if log and found and max(found) > 8 * min(found):
        grid.flat[0].set_yscale("log")
        plain_numbers(grid.flat[0])
    for row in grid:
        row[0].set_ylabel(what)
    for axes in grid[-1]:
        axes.set_xlabel("block")


def grid_of(count: int, narrow: bool) -> tuple[int, int]:
    """Rows and columns of so many panels."""
    columns = 1 if narrow else min(count, 3)
    return math.ceil(count / columns), columns


def panel_height(runs: Sequence[Run], narrow: bool) -> float:
    """Inches for the panels of all series."""
    return 0.5 + 2.1 * grid_of(len(names_of([run for run in runs if run.blocks])), narrow)[0]


def dense_scores(runs: Sequence[Run], task: str) -> list[tuple[str, Any]]:
    """Name and scores of the dense models in a task: each once, and again where other items were asked."""
    several = len({run.model for run in runs}) > 1
    found: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for run in runs:
        one = {**run.dense.get("tasks", {}), **run.dense.get("groups", {})}.get(task)
        if one is not None:
            key = (run.model, *(one.get(part) for part in ("acc", "stderr", "items")))
            found.setdefault(key, (f"dense {run.model}" if several else "dense", one))
    return list(found.values())


def task_scores(figure: Any, runs: Sequence[Run], ink: Ink, narrow: bool) -> None:
    """Accuracy with one standard error, run beside run and the dense model's, task by task."""
    axes = figure.subplots()
    known = [run for run in runs if run.scores]
    tasks = list(dict.fromkeys(name for run in known for name, one in run.scores.items() if one.get("acc") is not None))
    models = list(dict.fromkeys(model for name in tasks for model, _ in dense_scores(known, name)))
    step = 0.8 / (len(known) + len(models))
    named: set[str] = set()

    def once(name: str) -> str | None:
        """The name for the legend, the first time that it is asked for."""
        new = name not in named
        named.add(name)
        return name if new else None

    for place, name in enumerate(tasks):
        for model, one in dense_scores(known, name):
            number = models.index(model)
            where = place - 0.4 + step * (number + 0.5)
            dot(axes, one, where, ink.text, DENSE[number % len(DENSE)], once(model))
        for number, run in enumerate(known, start=len(models)):
            if run.scores.get(name, {}).get("acc") is not None:
                colour, marker = sign(run, runs, ink)
                dot(axes, run.scores[name], place - 0.4 + step * (number + 0.5), colour, marker, once(run.name))
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, ± one standard error")
    axes.grid(axis="y", visible=False)
    legend(figure, axes, narrow)


def sign(run: Run, runs: Sequence[Run], ink: Ink) -> tuple[str, str]:
    """The colour of a run's series, as in every other plot, and a marker that tells it from others of the series."""
    series = [one.name for one in runs if label(one, runs) == label(run, runs) and one.scores]
    return ink.of(names_of(runs).index(label(run, runs))), MARKERS[series.index(run.name) % len(MARKERS)]


def dot(axes: Any, one: Any, where: float, colour: str, marker: str, name: str | None) -> None:
    """One accuracy with its error bar."""
    error = one.get("stderr") or 0.0
    axes.errorbar(
        [one["acc"]], [where], xerr=[error], color=colour, marker=marker, ms=4.5, lw=1.3, capsize=2, ls="", label=name
    )


def task_height(runs: Sequence[Run], narrow: bool) -> float:
    """Inches for all tasks and runs."""
    known = [run for run in runs if run.scores]
    tasks = {name for run in known for name in run.scores}
    rows = len(known) + len({run.model for run in known})
    return 1.1 + len(tasks) * (0.22 + 0.13 * rows) + (0.18 * rows if narrow else 0)


def legend(figure: Any, axes: Any, narrow: bool) -> None:
    """Above the plot, where it covers nothing; a single series needs none."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(
            handles, names, loc="outside upper left", ncols=1 if narrow else min(len(names), 4), frameon=False,
            fontsize=9, handlelength=1.6, columnspacing=1.6,
        )  # fmt: skip


def plain_numbers(axes: Any) -> None:
    """`20 50 100` instead of powers of ten with signs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    # Over more powers of ten there is no room for what lies between them.
    between = (1.0, 2.0, 5.0) if high < 1e5 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{',.0f' if 1 <= value < 1e6 else '.4g'}}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _uneven(run: Run) -> bool:
    shares = [block["sparsity"] for block in run.blocks]
    return bool(shares) and max(shares) - min(shares) > UNIFORM


PLOTS = (
    Plot(
        "perplexity", "Perplexity against sparsity",
        "Lower is better. Bars: one standard error over windows.",
        perplexity, lambda runs, narrow: 3.9,
        lambda runs: sum(run.perplexity is not None and run.reached is not None for run in runs) > 1,
    ),
    Plot(
        "sparsity-by-block", "Sparsity by block",
        "Share of each block's weights that was removed; the label at a line's end is the whole model's.",
        block_sparsities, panel_height, lambda runs: any(_uneven(run) for run in runs),
    ),
    Plot(
        "error-by-block", "Error by block",
        "Squared difference of a block's output from the dense block's on the same input, over the squared dense "
        "output. The label at a line's end is the sparsity.",
        block_errors, panel_height,
        lambda runs: any(block.get("error") is not None for run in runs for block in run.blocks),
    ),
    Plot(
        "tasks", "Benchmark tasks", "Accuracy by task; the dense model in the colour of the text.",
        task_scores, task_height, lambda runs: any(run.scores for run in runs),
    ),
)  # fmt: skip
