"""`prunus prune` and `prunus plan`: the same options, done or only foretold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prunus.cli.options import RECIPE, RUN, Json, Model, Out, Quiet, option, takes, to_recipe
from prunus.cli.session import RESUMES, show, working

EXAMPLES = {
    "prune": """
prunus prune smollm2 out
prunus prune smollm2 out --method sparsegpt --sparsity 0.6 --allocation owl
prunus prune ./llama out --pattern 2:4 --calibration notes.txt --samples 64
prunus prune --recipe recipes/wanda-50.yaml --sparsity 0.7 --overwrite
""",
    "plan": """
prunus plan smollm2
prunus plan ./llama --method sparsegpt --length 2048
prunus plan --recipe recipes/sparsegpt-50.yaml --json
""",
}

DryRun = Annotated[bool, option("--dry-run", RUN, "Only say what would happen, as `prunus plan` does.")]
Restart = Annotated[bool, option("--restart", RUN, "Forget an unfinished run of this OUT and begin again.")]
Overwrite = Annotated[bool, option("--overwrite", RUN, "Replace OUT if it exists, once the new one is complete.")]


@takes(RECIPE)
def prune(
    model: Model = None,
    out: Out = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Prune MODEL into the new folder OUT, which every tool that reads Hugging Face models can load.

    Works block by block, so memory does not grow with depth. If it is interrupted, the same command
    continues. The result is loaded by stock transformers and compared before it is called done.
    """
    if dry_run:
        _plan(model, out, as_json, quiet, options)
        return
    with working(quiet=quiet, interrupted=RESUMES) as progress:
        from prunus import report
        from prunus.errors import RecipeError

        recipe = to_recipe({"model": model, "out": out, **options})
        if recipe.out is None:
            raise RecipeError(
                "OUT is missing: give the new folder for the pruned checkpoint, as in `prunus prune MODEL OUT`."
            )
        from prunus.engine import prune as engine

        result = engine(recipe, Path(recipe.out), restart=restart, overwrite=overwrite, progress=progress)
    show(result, report.prune_text, as_json=as_json)


@takes(RECIPE)
def plan(model: Model = None, out: Out = None, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
    """Say what `prunus prune` with the same options would do; reads no weights.

    Names what is touched and what is left alone, the sparsity of each block, peak memory, disk and
    time, and what the chosen pattern buys at run time and what it does not.
    """
    _plan(model, out, as_json, quiet, options)


def _plan(model: str | None, out: str | None, as_json: bool, quiet: bool, options: dict[str, Any]) -> None:
    with working(quiet=quiet):
        from prunus import report

        recipe = to_recipe({"model": model, "out": out, **options})
        from prunus.planning import plan as foretell

        result = foretell(recipe)
    show(result, report.plan_text, as_json=as_json)
