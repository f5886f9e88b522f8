"""`prunus run`: all stages of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunus.cli.options import RUN, Json, Quiet, option
from prunus.cli.prune import Overwrite, Restart
from prunus.cli.session import show, working

EXAMPLES = {
    "run": """
prunus run recipes/wanda-50.yaml
prunus run recipes/sparsegpt-50.yaml --out pruned --json
"""
}

File = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", show_default=False, help="A recipe; paths in it are relative to it.")
]
Out = Annotated[str | None, option("--out DIR", RUN, "Write here instead of the recipe's `out`.")]


def run(
    file: File,
    out: Out = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do all stages of a recipe: prune, then recover and evaluate beside the dense model if it says so.

    Run again, it skips the stages that are done and continues the one that was interrupted. The
    evaluation is kept in OUT/evaluation.json.
    """
    interrupted = "Interrupted. The same command again continues where it stopped."
    with working(quiet=quiet, interrupted=interrupted) as progress:
        from prunus import report
        from prunus.recipe_options import from_options
        from prunus.stages import run as run_stages

        recipe = from_options({"out": out}, file=file, spell={"out": "--out"})
        result = run_stages(recipe, restart=restart, overwrite=overwrite, progress=progress)
    show(result, report.run_text, as_json=as_json)
