"""The page itself: one HTML file that needs no network and runs no script, and the plots as PNG beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError
from prunus.text import bytes_text, pairs
from prunus.webpage import parts
from prunus.webpage.gather import Run, gather
from prunus.webpage.parts import esc
from prunus.webpage.plots import PLOTS, share
from prunus.webpage.render import png, svg

# Nothing may be fetched and nothing run, whatever a file smuggles into a name.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{lead}{facts}</header>
{body}
<footer>Made by prunus {version} on {day}. Numbers compare only at equal text, windows and items.</footer>
</main>
</body>
</html>
"""


def write_page(folders: Sequence[Path], file: Path) -> dict[str, Any]:
    """Show runs and comparisons in one page.

    Args:
        folders: what prune, run or compare made.
        file: the page to write; its plots go into a folder `NAME-plots` beside it.

    Returns:
        page, bytes, plots (paths of the PNG files) and runs (how many it shows).

    Raises:
        RecipeError: a folder holds no run, the page cannot be written, or matplotlib is not installed.
    """
    runs = gather([Path(folder) for folder in folders])
    if file.suffix not in (".html", ".htm"):
        raise RecipeError(f"The page {file} must end in .html.")
    shown = [plot for plot in PLOTS if plot.wanted(runs)]
    text = page(runs)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        plots = file.with_name(f"{file.stem}-plots")
        if shown:
            plots.mkdir(exist_ok=True)
        for plot in shown:
            png(plot, runs, plots / f"{plot.name}.png")
        beside = file.with_name(f".{file.name}.partial")
        beside.write_text(text, "utf-8")
        beside.replace(file)
    except OSError as problem:
        raise RecipeError(f"{file} cannot be written: {problem.strerror}. Choose another place by --to.") from problem
    pictures = [str(plots / f"{plot.name}.png") for plot in shown]
    return {"page": str(file), "bytes": len(text.encode()), "plots": pictures, "runs": len(runs)}


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    import prunus

    return HTML.format(
        policy=POLICY,
        title=esc(title(runs)),
        style=files("prunus.webpage").joinpath("page.css").read_text("utf-8"),
        lead=f'<p class="lead">{esc(lead(runs))}</p>',
        facts=parts.facts(runs),
        body="\n".join(section for section in sections(runs) if section),
        version=esc(prunus.__version__),
        day=datetime.now(UTC).date().isoformat(),
    )


def sections(runs: Sequence[Run]) -> list[str]:
    """What the page is made of, in the order of interest."""
    known = {plot.name: plot for plot in PLOTS if plot.wanted(runs)}

    def plot(name: str) -> str:
        return figure(known[name], runs) if name in known else ""

    judged = any(run.scores for run in runs)
    even = "" if "sparsity-by-block" in known else evenly(runs)
    return [
        section("Results", parts.overview(runs), text_note(runs)),
        plot("perplexity"),
        section("Benchmark tasks", parts.tasks(runs), task_note(runs)) if judged else "",
        plot("tasks"),
        plot("sparsity-by-block") or even,
        plot("error-by-block"),
        section("Size and speed", parts.sizes(runs), STORED) if any(run.prune for run in runs) else "",
        section("In their own words", parts.samples(runs), "The same beginning, continued greedily by each model."),
        section("Recipes and provenance", "".join(parts.provenance(run) for run in runs)),
    ]


STORED = (
    "Zeros are stored like any other number, so the written folder is as large as the dense one until it is exported. "
    "Speeds appear where the output of “prunus bench --json” lies in a run's folder as bench.json."
)


def section(name: str, content: str, note: str = "") -> str:
    """A heading, a line below it, and the content; empty where there is no content."""
    below = f'<p class="muted">{esc(note)}</p>' if note else ""
    return f"<section><h2>{esc(name)}</h2>{below}{content}</section>" if content else ""


def figure(plot: Any, runs: Sequence[Run]) -> str:
    """A plot in two shapes, of which the width of the window shows one."""
    shapes = "".join(
        f'<div class="{kind}">{svg(plot, runs, narrow=kind == "narrow")}</div>' for kind in ("wide", "narrow")
    )
    caption = f"<figcaption>{esc(plot.caption)}</figcaption>"
    return f'<section id="{esc(plot.name)}"><h2>{esc(plot.title)}</h2><figure>{shapes}{caption}</figure></section>'


def title(runs: Sequence[Run]) -> str:
    """What the page is about."""
    models = list(dict.fromkeys(run.model for run in runs))
    if len(runs) == 1:
        return f"{models[0]}, {runs[0].series}"
    return f"{len(runs)} recipes on {models[0]}" if len(models) == 1 else f"{len(runs)} recipes on {len(models)} models"


def lead(runs: Sequence[Run]) -> str:
    """One or two sentences that tell the outcome."""
    open_ = sum(run.status == "open" for run in runs)
    broken = [run for run in runs if run.status in ("failed", "collapsed")]
    rated = [run for run in runs if run.ratio is not None and run.reached is not None and run.status == "done"]
    words = []
    if len(rated) == 1:
        run = rated[0]
        words.append(
            f"With {share(run.reached or 0)} of the weights of its blocks removed, perplexity is {run.ratio:.3g} times "
            "the dense model's."
        )
    elif rated:
        good = [run for run in rated if (run.ratio or 0) <= 1.1]
        most = max(good, key=lambda run: run.reached or 0, default=None)
        least = min(rated, key=lambda run: run.ratio or 0)
        words.append(
            f"The most that was removed for at most 10 % more perplexity: {share(most.reached or 0)}, by "
            f"{_of(most, runs)}."
            if most is not None
            else f"None stays within 10 % of the dense perplexity; {_of(least, runs)} comes nearest, at "
            f"{least.ratio:.3g} times."
        )
    if not any(run.perplexity is not None or run.scores for run in runs) and not broken:
        words.append(
            "Not evaluated here: `prunus run` and `prunus compare` keep an evaluation, `prunus prune` has none."
        )
    if broken:
        words.append(f"{len(broken)} of {len(runs)} did not come to an end; the table says why.")
    if open_:
        words.append(f"{open_} of {len(runs)} are still to be made.")
    return " ".join(words)


def _of(run: Run, runs: Sequence[Run]) -> str:
    """A run's name, with its model where there are several."""
    return f"{run.name} on {run.model}" if len({one.model for one in runs}) > 1 else run.name


def text_note(runs: Sequence[Run]) -> str:
    """What the perplexities were measured on, where that is the same for all."""
    notes = {
        f"Perplexity on {run.evaluate['windows']} windows of {run.evaluate['length']} tokens of "
        f"{parts.public(run.evaluate['text'])}"
        for run in runs
        if run.perplexity is not None
    }
    bold = "Bold: the lowest of a model's runs that removed as much."
    if len(notes) > 1:
        return f"Perplexities of different texts or windows stand below and do not compare; see each recipe. {bold}"
    return f"{notes.pop()}; lower is better. {bold}" if notes else ""


def task_note(runs: Sequence[Run]) -> str:
    """How the tasks were asked."""
    asked = [run.evaluate["asked"] for run in runs if run.scores]
    limits = {one["limit"] for one in asked}
    items = f"The first {asked[0]['limit']} items of each" if asked[0]["limit"] else "All items"
    if len(limits) > 1:
        items = "Different numbers of items (see each recipe), which do not compare"
    by = " and ".join(sorted({str(one["lm_eval"]) for one in asked}))
    return (
        f"{items}, by lm-eval {by}; ± one standard error. Changes are paired item by item, with 95 % intervals; worse "
        "and better mean p below 0.05."
    )


def evenly(runs: Sequence[Run]) -> str:
    """A sentence in place of a plot that would show straight lines."""
    if not any(run.blocks for run in runs):
        return ""
    return section("Sparsity by block", "<p>Every block lost the same share of its weights.</p>")


def page_text(result: Mapping[str, Any]) -> str:
    """Where everything lies, for a terminal."""
    plots = "\n".join(f"  {path}" for path in result["plots"])
    facts = {"page": f"{result['page']} ({bytes_text(result['bytes'])}, {result['runs']} runs)"}
    return pairs(facts) + (f"\n\nPlots:\n{plots}" if plots else "")
