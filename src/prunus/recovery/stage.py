"""The recovery of a recipe, as the stage behind its pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunus.distributed import Processes
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
    assert recipe.recover is not None
    part = recipe.recover.model_copy(update={"dense": recipe.recover.dense or recipe.model})
    asked = recipe.model_copy(update={"model": str(pruned), "recover": part})
    found = None if restart else _finished(asked, pruned, out)
    if found is not None:
        return {**found, "skipped": True}
    return {**work(asked, out, restart=restart, overwrite=overwrite, progress=progress), "skipped": False}


def _finished(asked: Recipe, pruned: Path, out: Path) -> dict[str, Any] | None:
    """The result in `out`, if it is of the same recovery, and nothing that it read has changed."""
    record = read_record(out)
    if not record.get("pruned") or not isinstance(record.get("result"), dict):
        return None
    names = ("model", "recover", "device", "dtype", "trust_remote_code")
    wanted = json.loads(json.dumps({name: asked.resolved()[name] for name in names}))
    same = {name: record.get("recipe", {}).get(name) for name in names} == wanted
    if not same or asked.recover is None:
        return None
    recovery = choose(asked.recover)
    part = settled(asked.recover, recovery)
    text = text_of(asked, part, pruned, vocabulary=None, processes=Processes())
    hashes = json.loads(json.dumps(inputs(asked, part, recovery, pruned, text)))
    before = record.get("fingerprint") or {}
    return dict(record["result"]) if all(before.get(name) == value for name, value in hashes.items()) else None
