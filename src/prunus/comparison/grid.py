"""Which recipes a comparison is of: files, and options with several values, every one with every other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError
from prunus.recipe import EvaluatePart, Recipe, pattern_sparsity
from prunus.recipe_options import PLACES, from_options
from prunus.recipe_yaml import scalar

# Options that may have several values, in the order in which they name a row.
AXES = ("method", "metric", "update", "pattern", "sparsity", "allocation", "compat", "samples", "length", "seed")
# `length` and `bos` are the calibration's, so the evaluation's have other names.
EVALUATION = {
    "text": "evaluate.text", "eval_length": "evaluate.length", "windows": "evaluate.windows",
    "sample": "evaluate.sample", "tasks": "evaluate.tasks", "task_data": "evaluate.task_data",
    "limit": "evaluate.limit", "batch": "evaluate.batch",
}  # fmt: skip
LARGEST = 1000


@dataclass(frozen=True)
class Entry:
    """One row to be.

    Attributes:
        name: unique, and fit for a folder's name.
        recipe: without `out`, with `evaluate`.
    """

    name: str
    recipe: Recipe


def entries(
    files: Sequence[str | Path],
    *,
    models: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    spell: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Every file with every model and every combination of the options' values.

    Args:
        files: YAML recipes; none: the defaults, and what `options` say.
        models: instead of the recipes' own.
        options: flat values as of `recipe_options.from_options`, and those of `EVALUATION`; of `AXES`, a text with
            commas or a list means several. They override the files.
        spell: how the user knows an option, for complaints.

    Raises:
        RecipeError: a recipe cannot be, names a part that does not exist, or there are too many or none.
    """
    fixed = {name: value for name, value in (options or {}).items() if value is not None}
    axes = {name: values(name, fixed.pop(name)) for name in AXES if name in fixed}
    found: list[tuple[list[str], Recipe]] = []
    for file in files or [None]:
        for model in models or [None]:
            for combination in combinations(axes):
                given = {**fixed, **combination, **({} if model is None else {"model": model})}
                made = from_options(given, file=file, places={**PLACES, **EVALUATION}, spell=spell)
                # An unknown name is a slip of the pen: better said now than in a row of the table.
                made.build()
                if made.recover is not None:
                    raise RecipeError(f"{file}: a comparison does not recover yet; take `recover` out of the recipe.")
                judged = made.evaluate
                if judged is not None and judged.max_ppl_ratio is not None and judged.text == "none":
                    raise RecipeError(
                        "With the text 'none' no perplexity is measured that --max-ppl-ratio could stop; leave one out."
                    )
                words = [Path(file).stem] if file is not None and (len(files) > 1 or not axes) else []
                words += [Path(model).name] if model is not None and len(models) > 1 else []
                words += [
                    shown(name, combination[name]) for name in axes if name in combination and several(axes, name)
                ]
                found.append((words, complete(made)))
                if len(found) > LARGEST:
                    raise RecipeError(f"These are more than {LARGEST} recipes; compare fewer at a time.")
    return [Entry(name, recipe) for name, (_, recipe) in zip(unique(found), found, strict=True)]


def values(name: str, given: Any) -> list[Any]:
    """The values of one axis, in the order given, each once.

    Raises:
        RecipeError: there is none between two commas.
    """
    parts = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else [given]
    parts = [scalar(part.strip()) if isinstance(part, str) else part for part in parts]
    if any(part == "" or part is None for part in parts):
        raise RecipeError(f"--{name.replace('_', '-')} {given!r} has an empty value; write them as in 0.5,0.6,0.7.")
    return list(dict.fromkeys(parts))


def combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every value with every other; an N:M pattern fixes the sparsity, so it meets the sparsities only once."""
    seen = set()
    for chosen in itertools.product(*axes.values()):
        combination = dict(zip(axes, chosen, strict=True))
        if pattern_sparsity(str(combination.get("pattern", ""))) is not None:
            combination.pop("sparsity", None)
        key = tuple(combination.items())
        if key not in seen:
            seen.add(key)
            yield combination


def several(axes: Mapping[str, Sequence[Any]], name: str) -> bool:
    """Whether an axis tells rows apart; with a single axis its value is the name even so."""
    return len(axes[name]) > 1 or len(axes) == 1


def shown(name: str, value: Any) -> str:
    """A value as a part of a name: numbers that say nothing alone get their axis in front."""
    return f"{name}{value}" if name in ("samples", "length", "seed") else str(value)


def complete(made: Recipe) -> Recipe:
    """The recipe as a row runs it: judged always, and written where the comparison says."""
    return made.model_copy(update={"out": None, "evaluate": made.evaluate or EvaluatePart()})


def unique(found: Sequence[tuple[Sequence[str], Recipe]]) -> list[str]:
    """A folder's name for each row; two of the same get numbers."""
    names: list[str] = []
    for words, recipe in found:
        text = "-".join(words) or recipe.prune.method
        name = re.sub(r"[^A-Za-z0-9._+-]+", "_", text.replace(":", "of")).strip("._") or "recipe"
        count = sum(re.fullmatch(rf"{re.escape(name)}(~\d+)?", other) is not None for other in names)
        names.append(name if not count else f"{name}~{count + 1}")
    return names
