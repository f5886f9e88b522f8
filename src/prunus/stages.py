"""All stages of a recipe, one after the other; what is already there is not done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError
from prunus.progress import Progress, Silent
from prunus.recipe import EvaluatePart, Recipe

RECORD = "prunus.json"
LIMIT = "guard.json"  # of a checkpoint that was finished before its recipe had a limit
EVALUATION = "evaluation.json"


def run(
    recipe: Recipe, *, restart: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Prune, then recover and evaluate if the recipe says so; what lies there for the same recipe is not done again.

    Same means: the recipe, the model's files, the texts and the files that settings name.

    Args:
        recipe: must name `out`.
        restart: forget an unfinished run.
        overwrite: replace an OUT that another recipe made.
        progress: told about every block and window.

    Returns:
        `{"prune": ..., "recover": ..., "evaluate": ..., "skipped": [names of stages that were already done]}`; None
        for a stage that the recipe does not have.

    Raises:
        RecipeError: the recipe has no `out`.
        PrunusError: as the stages raise.
    """
    if recipe.out is None:
        raise RecipeError("The recipe has no `out`; add the folder for the pruned checkpoint, such as `out: pruned`.")
    progress = progress or Silent()
    # With a recovery OUT is what comes out of it; the pruned model, which it begins with, stays beside.
    pruning = Path(recipe.out if recipe.recover is None else f"{recipe.out}-pruned")
    skipped = []
    pruned = None if restart else finished(recipe, pruning, progress)
    if pruned is None:
        from prunus.engine import prune

        if recipe.recover is not None:
            from prunus.job import check_out

            # What lies there cannot come from a pruned model that is still to be made.
            check_out(Path(recipe.out), pruning, overwrite)
        # What a recovery is to mend is judged behind it.
        judged = None if recipe.recover is not None else recipe.evaluate
        bare = recipe.model_copy(update={"recover": None, "evaluate": judged})
        pruned = prune(bare, pruning, restart=restart, overwrite=overwrite, progress=progress)
    else:
        skipped.append("prune")
    recovered = None
    if recipe.recover is not None:
        from prunus.recovery.stage import recover

        recovered = recover(recipe, pruning, Path(recipe.out), restart, overwrite, progress)
        skipped += ["recover"] if recovered.pop("skipped") else []
    out = Path(recipe.out)
    made, stage = (pruned, "prune") if recovered is None else (recovered, "recover")
    if stage in skipped:
        # Under a limit that came later, or another one: stages that are done now were held against it themselves.
        _check_limit(recipe, out, made, progress)
    if recipe.evaluate is None:
        return {"prune": pruned, "recover": recovered, "evaluate": None, "skipped": skipped}
    key = _evaluation_key(recipe, recipe.evaluate, out)
    evaluated = _evaluated(out, key)
    if evaluated is None:
        evaluated = _evaluate(recipe, recipe.evaluate, out, progress)
        _write(out / EVALUATION, {**key, "result": evaluated})
    else:
        skipped.append("evaluate")
    return {"prune": pruned, "recover": recovered, "evaluate": evaluated, "skipped": skipped}


def finished(recipe: Recipe, out: Path, progress: Progress | None = None) -> dict[str, Any] | None:
    """The result of an earlier run in `out` of the same recipe on the same inputs; None if there is none.

    The recipes are compared without `out` and `evaluate`, which do not change the checkpoint; the inputs are what the
    recipe only names: the model's files, the calibration tokens, the files of settings.

    Args:
        recipe: what is asked now.
        out: where the earlier run may have written.
        progress: told which inputs have changed, if only they have.

    Raises:
        PrunusError: an input is no longer there.
    """
    record = _read(out / RECORD)
    if not isinstance(record.get("recipe"), Mapping) or not isinstance(record.get("result"), Mapping):
        return None
    if _bare(record["recipe"]) != _bare(recipe.resolved()):
        return None
    changed = _changed(recipe, record.get("fingerprint"))
    if changed:
        (progress or Silent()).warn(f"{out} was made by this recipe, but from another {' and another '.join(changed)}.")
        return None
    return dict(record["result"])


def _check_limit(recipe: Recipe, out: Path, made: dict[str, Any], progress: Progress) -> None:
    """Hold a finished checkpoint against the recipe's `max_ppl_ratio`; what was measured is kept beside it.

    Args:
        recipe: with the limit or without.
        out: the checkpoint.
        made: the result of its stage; `guard` becomes what was found now.
        progress: told after each window.

    Raises:
        Collapsed: the perplexity is over the limit.
    """
    from prunus.evaluation import guard

    known = _read(out / LIMIT) or made.get("guard") or {}
    dense = recipe.model if recipe.recover is None else recipe.recover.dense or recipe.model
    found = guard.measure_finished(recipe, out, known, dense, progress)
    if found is None:
        return
    if found != known:
        _write(out / LIMIT, found)
    made["guard"] = found
    stays = f"{out} was made before this limit was set, and stays as it is."
    guard.check_ratio(found, {"perplexity": found["dense"]}, found["limit"], stays)


def _changed(recipe: Recipe, recorded: Any) -> list[str]:
    """Which of the inputs are not those of the record."""
    from prunus.job import identity
    from prunus.models.source import locate

    folder = locate(recipe.model, trust_remote_code=recipe.trust_remote_code)
    now = json.loads(json.dumps(identity(recipe, folder)))
    before = recorded if isinstance(recorded, Mapping) else {}
    words = {"model": "state of the model", "calibration": "calibration text", "files": "state of the named files"}
    return [word for key, word in words.items() if now[key] != before.get(key)]


def _bare(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in ("out", "recover", "evaluate")}


def _evaluate(recipe: Recipe, part: EvaluatePart, out: Path, progress: Progress) -> dict[str, Any]:
    from prunus.evaluation.perplexity import NO_TEXT, evaluate

    return evaluate(
        str(out),
        baseline=recipe.model if part.baseline else NO_TEXT,
        device=recipe.device,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        progress=progress,
        **part.asked(),
    )


def _evaluation_key(recipe: Recipe, part: EvaluatePart, out: Path) -> dict[str, Any]:
    """What an evaluation depends on: its own settings, the text, the dense model and the record of the checkpoint."""
    from prunus.data.reading import on_hub, read
    from prunus.evaluation.task_data import fingerprint
    from prunus.models.checkpoint import Checkpoint
    from prunus.models.source import locate

    record = _read(out / RECORD)
    # A data set of the hub counts by its name: what lies there is not fetched to find out that nothing is to be done.
    text = None if part.text == "none" or on_hub(part.text) else read(part.text, purpose="evaluation").sha256
    dense = locate(recipe.model, trust_remote_code=recipe.trust_remote_code) if part.baseline else None
    return {
        "evaluate": part.model_dump(mode="json", exclude={"max_ppl_ratio"}),
        "device": recipe.device,
        "dtype": recipe.dtype,
        "text_sha256": text,
        "task_data": fingerprint(part.task_data, part.tasks),
        "baseline": Checkpoint.open(dense).identity if dense else None,
        "of": record.get("fingerprint") or record.get("created"),
    }


def _evaluated(out: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    stored = _read(out / EVALUATION)
    same = all(stored.get(name) == value for name, value in key.items())
    return dict(stored["result"]) if same and isinstance(stored.get("result"), Mapping) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object from disk; empty where there is none, since then the stage is simply done again."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside, then renamed."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
    beside.replace(path)
