"""Benchmark tasks through lm-eval: its prompts, its scoring, its standard errors, on a model in memory."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.errors import CalibrationError, ModelError, PrunusError, RecipeError, near
from prunus.evaluation.local_tasks import local_spec
from prunus.evaluation.paired import versus, versus_group
from prunus.evaluation.task_data import GROUPS, Rows, check_folder
from prunus.models.quiet import quiet

if TYPE_CHECKING:
    from prunus.progress import Progress

# Of a definition: the name of the single task that it is, and groups and tags, as a word or a list.
SINGLE = re.compile(r"^[\"']?task[\"']?:[ \t]*[\"']?([\w:.+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
SEVERAL = re.compile(r"^[\"']?(?:group|tag)[\"']?:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)
WORD = re.compile(r"[\w:.+-]+")
INSTALL = "pip install 'prunus[tasks]'"
FEWSHOT_SEED = 1234  # lm-eval's default
Scores = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Tasks that are ready to be answered.

    Attributes:
        tasks: lm-eval's task objects by name, in the order asked for.
        groups: groups of `GROUPS` that were asked for, with their tasks.
        files: the local file behind each task; empty where the hub's data are used.
        limit: only the first so many items of each task; None: all.
        batch: requests in one forward pass.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, tuple[str, ...]]
    files: Mapping[str, Rows]
    limit: int | None
    batch: int


def prepare(names: Sequence[str], *, data: str | Path | None = None, limit: int | None = None, batch: int = 1) -> Suite:
    """Load and check the items of all tasks, before any model is.

    Args:
        names: of lm-eval's tasks, or of `GROUPS`.
        data: folder of `TASK.SPLIT.jsonl[.gz]` files; None: the hub's data sets.
        limit: only the first so many items of each.
        batch: requests in one forward pass, at least 1; larger is faster on a GPU and may move the last digits.

    Raises:
        RecipeError: an unknown task (the nearest are named), or lm-eval is not installed.
        CalibrationError: items are missing or malformed (file and line are named), or the hub cannot be reached.
    """
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise RecipeError(f"The tasks' {name} is a whole number of at least 1, not {value!r}.")
    harness = _harness()
    wanted = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    groups = {name: GROUPS[name] for name in names if name in GROUPS}
    if not wanted:
        raise RecipeError("No task was named; give some, such as arc_easy,hellaswag or owl7.")
    single, several = _defined(harness)
    for name in wanted:
        if name not in single and name not in several:
            raise _unknown(name, {*single, *several})
    folder = None if data is None else Path(data).expanduser()
    if folder is not None:
        check_folder(folder)
    with _calm():
        manager = _manager(harness, wanted, single)
        if folder is None:
            tasks: dict[str, Any] = {}
            for name in wanted:
                tasks |= _from_hub(manager, name)
            return Suite(tasks, groups, {}, limit, batch)
        loaded = {name: local_spec(manager, name, folder, limit) for name in wanted}
    tasks = {name: task for name, (task, _) in loaded.items()}
    return Suite(tasks, groups, {name: rows for name, (_, rows) in loaded.items()}, limit, batch)


def score(suite: Suite, model: Any, tokenizer: Any, *, note: str = "", progress: Progress) -> dict[str, Scores]:
    """Answer every task with a model.

    Args:
        suite: from `prepare`.
        model: a causal language model in evaluation mode, on its device.
        tokenizer: its own.
        note: what the progress line calls it.
        progress: told after every forward pass; a pass may answer several requests, so the last steps come at once.

    Returns:
        By task: acc, acc_norm, stderr (of acc; of the first metric where there is no acc), acc_norm_stderr (None
        where the task has no such metric), items, metric (the main one), metrics (all of lm-eval's, by name), and
        `scores`, the main metric item by item (None where lm-eval gives no number for an item).

    Raises:
        ModelError: lm-eval cannot use the model.
    """
    harness = _harness()
    found: dict[str, Scores] = {}
    with _calm():
        lm = _counting(harness.HFLM, progress)(pretrained=model, tokenizer=tokenizer, batch_size=suite.batch)
        for name, task in suite.tasks.items():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            lm.announce(f"{name} {note}".strip())
            try:
                result = harness.evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=suite.limit)
            except (RuntimeError, ValueError, AssertionError) as problem:
                raise ModelError(f"lm-eval cannot answer {name} with this model: {str(problem)[:300]}") from problem
            found[name] = _scores(task, result["results"][name], result["samples"][name])
    return found


def summary(suite: Suite, scores: Mapping[str, Scores], dense: Mapping[str, Scores] | None = None) -> dict[str, Any]:
    """`{"tasks": ..., "groups": ...}` for a result: the scores without the single items, beside the dense model's.

    With `dense`, each task and group gets `versus` (see `paired.versus`), paired item by item.
    """
    tasks = {name: {key: value for key, value in one.items() if key != "scores"} for name, one in scores.items()}
    for name, one in tasks.items():
        if dense is not None and scores[name]["scores"] is not None and dense[name]["scores"] is not None:
            upward = one["higher_is_better"]
            one["versus"] = versus(scores[name]["scores"], dense[name]["scores"], higher_is_better=upward)
    groups: dict[str, Any] = {}
    for group, members in suite.groups.items():
        # The tasks are of different items, so the variances of their means add up.
        errors = [tasks[name]["stderr"] for name in members]
        error = None if None in errors else math.hypot(*errors) / len(members)
        mean = sum(tasks[name]["acc"] for name in members) / len(members)
        groups[group] = {"acc": mean, "stderr": error, "tasks": list(members)}
        if dense is not None:
            groups[group]["versus"] = versus_group(
                {name: (scores[name]["scores"], dense[name]["scores"]) for name in members}
            )
    return {"tasks": tasks, "groups": groups}


def _scores(task: Any, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scores:
    """What lm-eval found for one task, under our names."""
    metrics: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    filters: dict[str, str] = {}
    for key, value in result.items():
        name, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float):
            filters.setdefault(name, chosen)
            target = errors if name.endswith("_stderr") else metrics
            target.setdefault(name.removesuffix("_stderr"), float(value))
    main = "acc" if "acc" in metrics else next(iter(metrics))
    # lm-eval gives one sample for each item and filter; pairs are of the filter whose number is shown.
    values = [sample.get(main) for sample in samples if sample.get("filter", filters[main]) == filters[main]]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return {
        "acc": metrics.get("acc"),
        "acc_norm": metrics.get("acc_norm"),
        "stderr": errors.get(main),
        "acc_norm_stderr": errors.get("acc_norm"),
        "items": len({sample["doc_id"] for sample in samples}),
        "metric": main,
        "metrics": metrics,
        "higher_is_better": bool(task.higher_is_better().get(main, True)),
        "scores": numbers if len(numbers) == len(values) else None,
    }


@dataclass(frozen=True)
class _Harness:
    """The parts of lm-eval that are used."""

    TaskManager: Any
    HFLM: Any
    evaluate: Any
    folder: Path


def _harness() -> _Harness:
    """lm-eval, imported when it is needed.

    Raises:
        RecipeError: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval.tasks
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM
    except ImportError as problem:
        raise RecipeError(f"Tasks need lm-eval, which is not installed ({problem}): {INSTALL}") from problem
    return _Harness(lm_eval.tasks.TaskManager, HFLM, evaluate, Path(str(lm_eval.tasks.__file__)).parent)


def _defined(harness: _Harness) -> tuple[dict[str, Path], set[str]]:
    """Single tasks and the folder that each is defined in, and names of groups and tags; a few words more may be there.

    Found by looking for lines: reading all definitions properly takes a quarter minute.
    """
    single: dict[str, Path] = {}
    several: set[str] = set()
    for path in sorted(harness.folder.glob("**/*yaml")):
        text = path.read_text("utf-8", errors="replace")
        for name in SINGLE.findall(text):
            single.setdefault(name, path.parent)
        for words in SEVERAL.findall(text):
            several.update(WORD.findall(words))
    return single, several


def _manager(harness: _Harness, wanted: Sequence[str], single: Mapping[str, Path]) -> Any:
    """lm-eval's task manager, which knows `wanted`.

    Raises:
        RecipeError: a name that it does not know after all.
    """
    if all(name in single for name in wanted):
        return harness.TaskManager(include_defaults=False, include_path=sorted({str(single[name]) for name in wanted}))
    # The tasks of a group or tag may lie in any folder: GLUE's are in eight.
    manager = harness.TaskManager()
    for name in wanted:
        if name not in manager.task_index:
            raise _unknown(name, manager.task_index)
    return manager


def _unknown(name: str, known: Iterable[str]) -> RecipeError:
    # Of 12,000 names only the nearest are of use.
    hint = near(name, {*known, *GROUPS}).partition(" Known:")[0]
    return RecipeError(f"lm-eval has no task {name!r}.{hint} Groups of prunus: {', '.join(GROUPS)}.")


def _from_hub(manager: Any, name: str) -> dict[str, Any]:
    """The tasks behind a name, with the hub's items.

    Raises:
        CalibrationError: the data cannot be had.
    """
    try:
        return dict(manager.load([name])["tasks"])
    except PrunusError:
        raise
    except Exception as problem:  # datasets raises dozens of kinds
        reason = str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__
        raise CalibrationError(
            f"The items of {name} cannot be had from the hub ({reason}). Give a folder that holds {name}.jsonl with "
            "--task-data."
        ) from problem


def _counting(base: Any, progress: Progress) -> Any:
    """lm-eval's model class that tells `progress` about every forward pass."""

    class Counting(base):
        def announce(self, what: str) -> None:
            """Name the stage that the next requests belong to."""
            self.what = what

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            progress.stage(self.what, len(requests))
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            progress.stage(self.what, len(requests))
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            progress.stage(self.what, 1)
            made = super().generate_until(requests, disable_tqdm=True)
            progress.advance("generated")
            return made

        def _model_call(self, *arguments: Any, **others: Any) -> Any:
            logits = super()._model_call(*arguments, **others)
            progress.advance()
            return logits

    return Counting


@contextmanager
def _calm() -> Iterator[None]:
    """While open, lm-eval and datasets write no log lines below errors and no bars; then they are as before."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils import logging as theirs

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, not are_progress_bars_disabled()
    verbosity = theirs.get_verbosity()
    logger.setLevel(logging.ERROR)
    theirs.set_verbosity_error()
    disable_progress_bars()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        theirs.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()
