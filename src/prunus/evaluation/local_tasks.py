"""lm-eval's own task definitions with their items read from local files instead of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.errors import CalibrationError, RecipeError
from prunus.evaluation.task_data import Rows, find, items_file, read_rows

# lm-eval asks the items from the test split where a task has one, else from the validation split.
SPLITS = ("test_split", "validation_split")


def local_spec(manager: Any, name: str, folder: Path, limit: int | None) -> tuple[Any, Rows]:
    """The task `name` of lm-eval on the items in `folder`; prompts and scoring stay lm-eval's.

    Args:
        manager: lm-eval's, that knows the task.
        name: of the task.
        folder: with `NAME.SPLIT.jsonl[.gz]` or `NAME.jsonl[.gz]`.
        limit: how many items will be asked; the others are read but not rendered.

    Returns:
        lm-eval's task object, and the rows behind it.

    Raises:
        RecipeError: a task that is no single YAML definition.
        CalibrationError: its file is missing or malformed.
    """
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name != "TASK":
        raise RecipeError(
            f"{name} is no single task of lm-eval but a group, a tag or a program; with --task-data name its tasks one "
            "by one."
        )
    config = entry.cfg
    split = next((config[key] for key in SPLITS if config.get(key)), None)
    if split is None:
        raise RecipeError(f"{name} names neither a test nor a validation split, so a file cannot stand for its items.")
    rows = read_rows(items_file(folder, name, split), name)
    shots = _examples(config, folder)
    task = _load(manager, _overrides(config, split, shots, rows), {split: rows, **shots})
    _render(task, rows, limit)
    return task, rows


def _examples(config: Mapping[str, Any], folder: Path) -> dict[str, Rows]:
    """The split that a few-shot task shows examples from; empty for a task without examples.

    Raises:
        CalibrationError: its file is missing or malformed.
    """
    name, split = config["task"], config.get("fewshot_split") or config.get("training_split")
    if not config.get("num_fewshot") or not split:
        return {}
    path = find(folder, name, split)
    if path is None:
        raise CalibrationError(
            f"{name} shows the model {config['num_fewshot']} examples from its {split} split, and {folder} has no "
            f"{name}.{split}.jsonl (nor .gz)."
        )
    return {split: read_rows(path, name)}


def _overrides(config: Mapping[str, Any], split: str, shots: Mapping[str, Rows], rows: Rows) -> dict[str, Any]:
    """What of the definition changes: splits that are not there, and the processing of items that are processed."""
    there = {split, *shots}
    changed: dict[str, Any] = {"task": config["task"], "dataset_kwargs": None, "dataset_name": None}
    splits = (*SPLITS, "training_split", "fewshot_split")
    changed |= {key: None for key in splits if config.get(key) and config[key] not in there}
    # HellaSwag is often published in the form that lm-eval's own processing would give.
    if config.get("process_docs") and {"query", "choices"} <= rows.rows[0].keys():
        changed["process_docs"] = None
    return changed


def _load(manager: Any, overrides: dict[str, Any], files: Mapping[str, Rows]) -> Any:
    """Build the task object from the definition with the overrides; `files` are its splits, the items' one first.

    Raises:
        CalibrationError: the first item does not have what the definition asks for.
    """
    from datasets import Dataset

    def items(**_: Any) -> dict[str, Any]:
        return {split: Dataset.from_list(rows.rows) for split, rows in files.items()}

    name, rows = overrides["task"], next(iter(files.values()))
    group = {"group": "prunus_local", "task": [{**overrides, "custom_dataset": items}]}
    try:
        return manager.load([group])["tasks"][name]
    except Exception as problem:  # the definition's own templates and functions may raise anything
        raise CalibrationError(
            f"{rows.path}, line {rows.lines[0]} does not fit the task {name} of lm-eval "
            f"({type(problem).__name__}: {str(problem)[:160]}); compare it with the data set's published form."
        ) from problem


def _render(task: Any, rows: Rows, limit: int | None) -> None:
    """Render every item that will be asked, so that a broken one is named by its line before a model is loaded.

    Raises:
        CalibrationError: with file and line.
    """
    docs = task.eval_docs
    for index in range(len(docs) if limit is None else min(limit, len(docs))):
        try:
            problem = _complaint(task, docs[index])
        except Exception as raised:  # as in `_load`
            problem = f"{type(raised).__name__}: {str(raised)[:160]}"
        if problem:
            # Processing may drop items; then the number of the item is all that is known.
            place = f"line {rows.lines[index]}" if len(docs) == len(rows.rows) else f"item {index}"
            raise CalibrationError(f"{rows.path}, {place} does not fit {task.task_name} ({problem}); mend the line.")


def _complaint(task: Any, doc: Any) -> str:
    """Why an item cannot be asked, or an empty string."""
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    choices = task.doc_to_choice(doc)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        return "it has no two choices of text"
    answer = text if isinstance(text, int) else target
    if isinstance(answer, int) and not 0 <= answer < len(choices):
        return f"its answer is number {answer} of {len(choices)} choices"
    if isinstance(answer, str) and answer not in choices:
        return f"its answer {answer[:40]!r} is none of its choices"
    return ""
