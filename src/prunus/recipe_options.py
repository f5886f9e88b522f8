"""Recipes from flat options, as the command line and Python's keyword arguments give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError, near
from prunus.recipe import CalibrationPart, EvaluatePart, PrunePart, Recipe, RecoverPart, Setting, read_recipe, recipe
from prunus.recipe_yaml import scalar

# Flat names, as options and Python arguments spell them, and their place in a recipe.
PLACES = {
    **{name: name for name in ("model", "out", "device", "dtype", "trust_remote_code")},
    **{name: f"prune.{name}" for name in PrunePart.model_fields},
    **{name: f"calibration.{name}" for name in CalibrationPart.model_fields if name != "source"},
    "calibration": "calibration.source",
    "max_ppl_ratio": "evaluate.max_ppl_ratio",
}
# The same for `prunus evaluate`, whose words are the keys of the recipe's `evaluate`.
EVALUATE_PLACES = {
    **{name: name for name in ("model", "device", "dtype", "trust_remote_code")},
    **{name: f"evaluate.{name}" for name in EvaluatePart.model_fields if name != "baseline"},
}
# And for `prunus recover`, whose words are the keys of the recipe's `recover`.
RECOVER_PLACES = {
    **{name: name for name in ("model", "out", "device", "dtype", "trust_remote_code")},
    **{name: f"recover.{name}" for name in RecoverPart.model_fields},
    "max_ppl_ratio": "evaluate.max_ppl_ratio",
}


def from_options(
    options: Mapping[str, Any],
    *,
    file: str | Path | None = None,
    places: Mapping[str, str] = PLACES,
    spell: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe from flat options, laid over a file if one is given.

    Args:
        options: the values that the user gave; None counts as not given.
        file: YAML that supplies the rest.
        places: where each option stands in a recipe.
        spell: how the user knows an option, for complaints (`sparsity` -> `--sparsity`); the bare name otherwise.

    Raises:
        RecipeError: as `recipe`; also for an unknown option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in places:
            raise RecipeError(f"There is no option {name!r}.{near(name, places)}")
    data = read_recipe(Path(file)) if file else {}
    _forget(data, given)
    for name, value in given.items():
        *parents, last = places[name].split(".")
        part = data
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = {**part.get(last, {}), **value} if name == "settings" else value
    # A missing model is named as the option or argument that would give it.
    names = {places[name]: (spell or {}).get(name, name) for name in {"model", *given}}
    return recipe(data, source=str(file or ""), names=names)


def _forget(data: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Drop from the file what belongs to a choice that the options replace: its settings, an N:M's sparsity."""
    prune = data.get("prune")
    if not isinstance(prune, dict):
        return
    if "preset" in given:  # a whole choice: nothing of the file's own stays
        for name in ("method", "metric", "update", "allocation", "settings"):
            prune.pop(name, None)
    elif "method" in given:
        prune.pop("preset", None)
    owners = {"method": ("metric.", "update.", "method.", "score."), "metric": ("metric.",), "update": ("update.",)}
    owners |= {"pattern": ("pattern.",), "allocation": ("allocation.",)}
    dropped = tuple(prefix for name, prefixes in owners.items() if name in given for prefix in prefixes)
    dropped += ("ranking.",) if "method" in given else ()
    if dropped and isinstance(prune.get("settings"), dict):
        prune["settings"] = {key: value for key, value in prune["settings"].items() if not key.startswith(dropped)}
    if "pattern" in given and "sparsity" not in given and re.fullmatch(r"[\d\s]+:[\d\s]+", str(given["pattern"])):
        prune.pop("sparsity", None)


def parse_settings(pairs: list[str]) -> dict[str, Setting]:
    """`["update.damp=0.01"]` -> `{"update.damp": 0.01}`.

    Raises:
        RecipeError: a pair has no `=` or names its part twice.
    """
    settings: dict[str, Setting] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key or not value.strip():
            raise RecipeError(f"--set {pair!r} must be part.field=value, such as --set update.damp=0.01.")
        if key in settings:
            raise RecipeError(f"--set {key} is given twice; give it once.")
        settings[key] = scalar(value.strip())
    return settings
