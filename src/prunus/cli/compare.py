"""`prunus compare` and `prunus report`: many recipes in one table, and a page that shows any run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli.options import MACHINE, RECIPE, RUN, WHAT, Json, Quiet, option, spell, takes
from prunus.cli.session import show, working

EXAMPLES = {
    "compare": """
prunus compare recipes/wanda-50.yaml recipes/sparsegpt-50.yaml --out pair
prunus compare --models smollm2 --method wanda,sparsegpt --sparsity 0.5,0.6
prunus compare --models smollm2,./llama --pattern 2:4,4:8 --tasks owl7
""",
    "report": """
prunus report out
prunus report grid --to grid.html
prunus report out-50 out-60 out-70 --to page.html
""",
}

JUDGE = "How to judge"
_SHARED = {name: row for name, row in RECIPE.items() if name not in ("recipe", "blocks", "max_ppl_ratio")}
COMPARE = {
    **_SHARED,
    "text": option("--text NAME|FILE", JUDGE, "As in `prunus evaluate`. Default: wikitext2."),
    "eval_length": option("--eval-length TOKENS", JUDGE, "Tokens in each window of it, at least 2. Default: 1024."),
    "windows": option("--windows N", JUDGE, "Only the first N windows, at least 1. Default: all."),
    "sample": option("--sample PROMPT", JUDGE, "What every model continues. Default: a beginning of a story."),
    "tasks": option("--tasks NAMES", JUDGE, "Benchmark tasks, as in `prunus evaluate`. Default: none."),
    "task_data": option("--task-data DIR", JUDGE, "Their items, as in `prunus evaluate`. Default: the hub's."),
    "limit": option("--limit N", JUDGE, "Only the first N items of each task, at least 1. Default: all."),
    "batch": option("--batch N", JUDGE, "Requests of tasks in one forward pass. Default: 1."),
    "max_ppl_ratio": option(
        "--max-ppl-ratio R",
        JUDGE,
        "A row whose perplexity is more than R times the dense model's, R above 1, ends there: its tasks are not run, "
        "and the table says why. Default: only warn.",
    ),
}

Files = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RECIPE.yaml...]", show_default=False, help="Recipes; none: options alone."),
]
Models = Annotated[
    str | None, option("--models A,B", WHAT, "Models, instead of the recipes' own; every recipe meets every model.")
]
Out = Annotated[Path, option("--out DIR", RUN, "Folder of the comparison, new or begun before. Default: comparison.")]
Keep = Annotated[bool, option("--keep", RUN, "Leave the pruned checkpoints in DIR/runs; they are removed otherwise.")]
Restart = Annotated[bool, option("--restart", RUN, "Make every row anew.")]
RayAddress = Annotated[
    str | None,
    option("--ray ADDRESS", MACHINE, "Run rows on this Ray cluster, auto or HOST:PORT; extra: ray. Default: here."),
]


@takes(COMPARE)
def compare(
    files: Files = None,
    models: Models = None,
    out: Out = Path("comparison"),
    keep: Keep = False,
    restart: Restart = False,
    ray: RayAddress = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Run many recipes and set them side by side: a table, a CSV, a page.

    Of method, metric, update, pattern, sparsity, allocation, compat, samples, length and seed several
    values may be given, with commas; every one meets every other. Interrupted, the same command goes
    on. A recipe that fails does not stop the others; the table says why.
    """
    interrupted = "Interrupted. The same command again continues where it stopped."
    with working(quiet=quiet, interrupted=interrupted) as progress:
        from prunus.comparison.grid import entries
        from prunus.comparison.table import compare_text
        from prunus.recipe_options import parse_settings

        if options["settings"] is not None:
            options["settings"] = parse_settings(options["settings"])
        names = [name.strip() for name in (models or "").split(",") if name.strip()]
        wanted = entries(files or [], models=names, options=options, spell={**spell(COMPARE), "model": "--models"})
        from prunus.comparison.run import compare as run

        result = run(wanted, out, keep=keep, restart=restart, ray=ray, progress=progress)
    show(result, compare_text, as_json=as_json)


Folders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", show_default=False, help="Folders that prune, run or compare made."),
]
To = Annotated[Path | None, option("--to FILE.html", RUN, "Where to write. Default: report.html in the first DIR.")]


def report(folders: Folders, to: To = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Write one HTML page that shows runs and comparisons; extra: report.

    It needs no network and no other file. The plots are also written as PNG, for papers, into a
    folder beside it.
    """
    with working(quiet=quiet):
        from prunus.webpage.write import page_text, write_page

        result = write_page(folders, to or folders[0] / "report.html")
    show(result, page_text, as_json=as_json)
