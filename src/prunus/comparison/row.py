"""One row of a comparison: prune, judge, keep the numbers. What an earlier call has finished is not done again."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunus.comparison.shared import Shared
from prunus.errors import PrunusError
from prunus.evaluation.guard import Collapsed, check_ratio
from prunus.evaluation.judging import Judged, beside, judge
from prunus.progress import Progress
from prunus.recipe import Recipe

RESULT, KEY, CHECKPOINT = "result.json", "key.json", "checkpoint"


@dataclass(frozen=True)
class Order:
    """What a process needs to make one row; plain values, so that another machine can be sent it.

    Attributes:
        name: of the row.
        recipe: resolved.
        folder: of the row's data; on a disk that all processes see.
        dense: file with the dense model's answers.
        key: what the row depends on; a result under another key is made anew.
        keep: leave the pruned checkpoint.
    """

    name: str
    recipe: Mapping[str, Any]
    folder: str
    dense: str
    key: str
    keep: bool


def finished(order: Order) -> dict[str, Any] | None:
    """The row that an earlier call has made; None if there is none, if it failed, or if its checkpoint is wanted."""
    found = read(Path(order.folder) / RESULT)
    if found.get("key") != order.key or found.get("status") == "failed":
        return None
    return None if order.keep and not (Path(order.folder) / CHECKPOINT).is_dir() else found


def make(order: Order, shared: Shared, progress: Progress) -> dict[str, Any]:
    """Run one row to its end; a failure is a row too, with its reason.

    Returns:
        What lies in `result.json`: name, key, status ("done", "collapsed" or "failed"), why (for the last two),
        recipe, prune (what `prune` returns), evaluate (what `evaluate` returns) and scores (item by item).
    """
    folder = Path(order.folder)
    row: dict[str, Any] = {"name": order.name, "key": order.key, "recipe": dict(order.recipe)}
    try:
        begin(folder, order.key)
        row |= work(order, folder, shared, progress)
    except PrunusError as refusal:
        row |= {"status": "failed", "why": str(refusal)}
    except Exception as problem:  # one row's fault must not cost the others
        row |= {"status": "failed", "why": fault(problem, folder)}
    write(folder / RESULT, row)
    if row["status"] != "failed":
        tidy(folder, order.keep)
    return row


def fault(problem: Exception, folder: Path) -> str:
    """The reason of a failure that is no mistake of the user's; the traceback goes to `error.txt` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text("".join(traceback.format_exception(problem)), "utf-8")
    text = " ".join(str(problem).split())[:300]
    return f"a fault of prunus, see {folder.name}/error.txt: {type(problem).__name__}: {text}"


def failed(order: Order, why: str) -> dict[str, Any]:
    """The row of a recipe that could not begin."""
    return {"name": order.name, "recipe": dict(order.recipe), "status": "failed", "why": why}


def work(order: Order, folder: Path, shared: Shared, progress: Progress) -> dict[str, Any]:
    """Prune (or go on where a killed call stopped), then ask the questions that the dense model was asked."""
    from prunus.engine import prune

    recipe = Recipe.model_validate(order.recipe)
    assert recipe.evaluate is not None, "a comparison judges every row"
    checkpoint = folder / CHECKPOINT
    # The folder is of this key alone, so a checkpoint in it is this recipe's, and it appears only when it is whole.
    pruned = read(checkpoint / "prunus.json").get("result")
    if pruned is None:
        # The limit is checked below, on the whole evaluation.
        pruned = prune(recipe.model_copy(update={"evaluate": None}), checkpoint, progress=progress)
    dense = Judged(**read(Path(order.dense)))
    questions, plan = shared.questions(recipe)
    warnings: list[str] = []
    found: dict[str, Any] = {"status": "done", "prune": pruned}

    def gate(result: Mapping[str, Any]) -> None:
        found["evaluate"] = {**result, "model": order.name, "baseline": dense.result}
        if "perplexity" in result:
            limit = recipe.evaluate.max_ppl_ratio if recipe.evaluate else None
            text = check_ratio(result, dense.result, limit, "Its tasks were not run.")
            warnings.extend([text] if text else [])

    try:
        judged = judge(str(checkpoint), checkpoint, plan, questions, progress=progress, gate=gate)
    except Collapsed as cliff:
        return {**found, "status": "collapsed", "why": str(cliff)}
    judged.result["model"] = order.name
    found["evaluate"] = {**beside(judged, dense, questions), **({"notes": warnings} if warnings else {})}
    found["scores"] = {name: one["scores"] for name, one in judged.scores.items()}
    return found


def begin(folder: Path, key: str) -> None:
    """Make the row's folder; what another key left in it is nobody's."""
    if read(folder / KEY).get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / KEY, {"key": key})


def tidy(folder: Path, keep: bool) -> None:
    """Remove the checkpoint, unless it is wanted: nine of them are as large as nine dense models."""
    if not keep:
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    shutil.rmtree(folder / f".{CHECKPOINT}.prunus", ignore_errors=True)
    (folder / "error.txt").unlink(missing_ok=True)


def ask_dense(recipe: Recipe, file: Path, shared: Shared, progress: Progress) -> None:
    """Ask the dense model everything, once for all rows that share the questions.

    Raises:
        PrunusError: the model, the text or the tasks cannot be used.
    """
    if read(file):
        return
    questions, plan = shared.questions(recipe)
    judged = judge(recipe.model, shared.folder(recipe), plan, questions, progress=progress)
    write(file, asdict(judged))


def read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none: then the work is simply done again."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside_it = path.with_name(f"{path.name}.partial")
    beside_it.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside_it.replace(path)
