"""What the rows of a comparison have in common and is made once: models' folders, windows, tasks, hashes of inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunus.data.reading import on_hub, read
from prunus.evaluation.guard import PROMPT
from prunus.evaluation.judging import Questions
from prunus.evaluation.loading import check_device, check_dtype
from prunus.evaluation.task_data import fingerprint
from prunus.evaluation.tasks import prepare
from prunus.evaluation.windows import Windows, choose, cut
from prunus.models.source import locate
from prunus.recipe import Recipe
from prunus.versions import decisive


@dataclass
class Shared:
    """Remembers by what it hangs on; one for each process, for the time of a comparison."""

    asked: dict[str, tuple[Questions, Windows | None]] = field(default_factory=dict)
    identities: dict[Path, Any] = field(default_factory=dict)
    hashes: dict[str, str | None] = field(default_factory=dict)

    def folder(self, recipe: Recipe) -> Path:
        """The dense model's folder."""
        return locate(recipe.model, trust_remote_code=recipe.trust_remote_code)

    def dense_key(self, recipe: Recipe) -> str:
        """What the dense model's answers depend on, as a short hash."""
        part = recipe.evaluate
        assert part is not None, "a comparison judges every row"
        return digest({
            "model": self._identity(recipe), "name": recipe.model, "asked": part.asked(), "device": recipe.device,
            "dtype": recipe.dtype, "text": None if part.text == "none" else self._hash(part.text, "evaluation"),
            "tasks": fingerprint(part.task_data, part.tasks), "versions": judging(bool(part.tasks)),
        })  # fmt: skip

    def row_key(self, recipe: Recipe) -> str:
        """What a row depends on: its recipe, the files that it names, versions, the questions and the dense model."""
        from prunus.job import named_files

        return digest({
            "recipe": recipe.resolved(), "dense": self.dense_key(recipe), "files": named_files(recipe),
            "calibration": self._hash(recipe.calibration.source, "calibration"),
        })  # fmt: skip

    def questions(self, recipe: Recipe) -> tuple[Questions, Windows | None]:
        """What the recipe's model and all models made from it are asked.

        Raises:
            PrunusError: the text, its windows or the tasks cannot be had.
        """
        key = self.dense_key(recipe)
        if key not in self.asked:
            self.asked[key] = self._ask(recipe)
        return self.asked[key]

    def _ask(self, recipe: Recipe) -> tuple[Questions, Windows | None]:
        part = recipe.evaluate
        assert part is not None, "a comparison judges every row"
        check_dtype(recipe.dtype, check_device(recipe.device))
        reading = None if part.text == "none" else read(part.text, purpose="evaluation")
        plan = None if reading is None else cut(reading, self.folder(recipe), part.length, part.bos)
        chosen = [] if plan is None else choose(len(plan.ids), part.windows, None, plan.source)
        suite = prepare(part.tasks, data=part.task_data, limit=part.limit, batch=part.batch) if part.tasks else None
        machine = (recipe.device, recipe.dtype, recipe.trust_remote_code)
        return Questions(reading, chosen, suite, part.sample or PROMPT, *machine), plan

    def _identity(self, recipe: Recipe) -> Any:
        from prunus.models.checkpoint import Checkpoint

        folder = self.folder(recipe)
        if folder not in self.identities:
            self.identities[folder] = Checkpoint.open(folder).identity
        return self.identities[folder]

    def _hash(self, source: str, purpose: Any) -> str | None:
        """sha256 of a text; a data set of the hub counts by its name."""
        key = f"{purpose}:{source}"
        if key not in self.hashes:
            self.hashes[key] = None if on_hub(source) else read(source, purpose=purpose).sha256
        return self.hashes[key]


def judging(tasks: bool) -> dict[str, str]:
    """Versions under which numbers compare; with tasks, that of lm-eval too."""
    return decisive() | ({"lm_eval": version("lm_eval")} if tasks and find_spec("lm_eval") else {})


def digest(value: Any) -> str:
    """16 hexadecimal digits of the sha256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return sha256(text.encode()).hexdigest()[:16]
