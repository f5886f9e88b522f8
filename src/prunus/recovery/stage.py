"""The recovery of a recipe, as the stage behind its pruning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.distributed import Processes
from prunus.job import check_out
from prunus.progress import Progress
from prunus.recipe import Recipe
from prunus.recovery.job import choose, inputs, settled, text_of
from prunus.recovery.pruned import read_record
from prunus.recovery.run import recover as work


def recover(
    recipe: Recipe, pruned: Path, out: Path, restart: bool, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Recover the folder that the recipe's pruning made, unless `out` is the same recovery of the same folder.

    Args:
        recipe: with a `recover` part.
        pruned: the pruned folder.
        out: where the recovered one goes.
        restart: forget an unfinished run, and do a finished one again.
        overwrite: replace an `out` that something else made.
        progress: told about every step.

    Returns:
        What `run.recover` returns, and `skipped`: whether it was already there.
    """
    asked = _asked(recipe, pruned)
    found = None if restart else _finished(asked, pruned, out)
    if found is not None:
        return {**found, "skipped": True}
    return {**work(asked, out, restart=restart, overwrite=overwrite, progress=progress), "skipped": False}


def check_place(recipe: Recipe, pruned: Path, out: Path, overwrite: bool) -> None:
    """See that a recovery may write `out`, before anything is pruned for it.

    Raises:
        RecipeError: something else lies there, or it cannot be written.
    """
    if not _same(_asked(recipe, pruned), read_record(out)):
        check_out(out, pruned, overwrite)


def _asked(recipe: Recipe, pruned: Path) -> Recipe:
    """The recipe of the recovery alone."""
    assert recipe.recover is not None
    part = recipe.recover.model_copy(update={"dense": recipe.recover.dense or recipe.model})
    return recipe.model_copy(update={"model": str(pruned), "recover": part})


def _same(asked: Recipe, record: Mapping[str, Any]) -> bool:
    """Whether a record is of a recovery that was asked for in the same words."""
    if not record.get("pruned") or not isinstance(record.get("result"), dict):
        return False
    names = ("model", "recover", "device", "dtype", "trust_remote_code")
    wanted = json.loads(json.dumps({name: asked.resolved()[name] for name in names}))
    return {name: record.get("recipe", {}).get(name) for name in names} == wanted


def _finished(asked: Recipe, pruned: Path, out: Path) -> dict[str, Any] | None:
    """The result in `out`, if it is of the same recovery, and nothing that it read has changed."""
    record = read_record(out)
    if not _same(asked, record) or asked.recover is None:
        return None
    recovery = choose(asked.recover)
    part = settled(asked.recover, recovery)
    text = text_of(asked, part, pruned, vocabulary=None, processes=Processes())
    hashes = json.loads(json.dumps(inputs(asked, part, recovery, pruned, text)))
    before = record.get("fingerprint") or {}
    return dict(record["result"]) if all(before.get(name) == value for name, value in hashes.items()) else None
