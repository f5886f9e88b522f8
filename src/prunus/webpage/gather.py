"""What a page is of, read from the folders that prune, run and compare leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One pruned model as far as its numbers are known; missing ones are empty.

    Attributes:
        name: in tables and legends.
        recipe: resolved.
        status: done, collapsed, failed, or open: of a comparison that has not come to it yet.
        why: for the last three, or what the evaluation noted.
        prune: what `prune` returned.
        evaluate: what `evaluate` returned, the dense model's under `baseline`.
        bench: sizes and speeds that a benchmark left, by name.
        fingerprint: hashes of what the run depended on.
        shown: the dense model's name where its own would mean two models.
    """

    name: str
    recipe: Data
    status: str = "done"
    why: str = ""
    prune: Data = field(default_factory=dict)
    evaluate: Data = field(default_factory=dict)
    bench: Data = field(default_factory=dict)
    fingerprint: Data = field(default_factory=dict)
    shown: str = ""

    @property
    def part(self) -> Data:
        """The recipe's `prune`."""
        return self.recipe.get("prune") or {}

    @property
    def model(self) -> str:
        """The dense model, of a path the last part."""
        return self.shown or Path(str(self.recipe.get("model", "?"))).name

    @property
    def asked(self) -> tuple[str, ...]:
        """What must be equal for two perplexities to compare: model, text and how it is read, engine and dtype."""
        return (*self.question(self.evaluate), str(self.evaluate.get("engine")))

    def question(self, found: Data) -> tuple[str, ...]:
        """What an evaluation of this model or of its dense one was asked, whatever engine computed the answer."""
        keys = ("text", "windows", "length", "bos", "dtype")
        return (str(self.recipe.get("model")), *(str(found.get(key)) for key in keys))

    @property
    def dense(self) -> Data:
        """The dense model's evaluation."""
        return self.evaluate.get("baseline") or {}

    @property
    def reached(self) -> float | None:
        """Share of the blocks' weights that is zero, in [0, 1)."""
        return (self.prune.get("sparsity") or {}).get("reached")

    @property
    def blocks(self) -> Sequence[Data]:
        """Each with name, sparsity and error."""
        return self.prune.get("blocks") or ()

    @property
    def perplexity(self) -> float | None:
        """On the evaluation's text."""
        return self.evaluate.get("perplexity")

    @property
    def ratio(self) -> float | None:
        """Perplexity over the dense model's."""
        dense = self.dense.get("perplexity")
        return self.perplexity / dense if self.perplexity is not None and dense else None

    @property
    def scores(self) -> dict[str, Data]:
        """Tasks, then groups."""
        return {**self.evaluate.get("tasks", {}), **self.evaluate.get("groups", {})}

    @property
    def series(self) -> str:
        """What stays the same along a line of sparsities: method, parts that replace its own, pattern, allocation."""
        part = self.part
        words = [str(part.get("method", "?"))]
        words += [str(part[key]) for key in ("metric", "update") if part.get(key)]
        words += [str(part["pattern"])] if ":" in str(part.get("pattern", "")) else []
        words += [str(part["allocation"])] if part.get("allocation", "uniform") != "uniform" else []
        words += list(self.prune.get("recovered", ()))
        return " + ".join(words)


def gather(folders: Sequence[Path]) -> list[Run]:
    """Every run in the folders, in their order.

    Raises:
        RecipeError: a folder is neither a pruned model nor a comparison.
    """
    runs: list[Run] = []
    for folder in folders:
        try:
            if (folder / "comparison.json").is_file():
                runs += of_comparison(folder)
            elif (folder / "prunus.json").is_file():
                runs.append(of_folder(folder))
            else:
                raise RecipeError(
                    f"{folder} holds neither prunus.json nor comparison.json; give a folder that `prunus prune`, "
                    "`prunus run` or `prunus compare` made."
                )
        except (KeyError, TypeError, AttributeError) as problem:
            raise RecipeError(
                f"{folder} holds a record that prunus did not write ({type(problem).__name__}: {problem}); make it "
                "again."
            ) from problem
    if all(run.status == "open" for run in runs):
        raise RecipeError(f"{folders[0]} holds no finished row yet; run the comparison first.")
    return told_apart(runs)


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same runs; models of different places that end alike get numbers: `out (1)`, `out (2)`."""
    places: dict[str, list[str]] = {}
    for run in runs:
        same = places.setdefault(run.model, [])
        if str(run.recipe.get("model")) not in same:
            same.append(str(run.recipe.get("model")))

    def shown(run: Run) -> str:
        same = places[run.model]
        return f"{run.model} ({same.index(str(run.recipe.get('model'))) + 1})" if len(same) > 1 else ""

    return [replace(run, shown=shown(run)) for run in runs]


def of_folder(folder: Path) -> Run:
    """A pruned model with what lies beside it."""
    record = read(folder / "prunus.json")
    evaluated = read(folder / "evaluation.json").get("result") or {}
    recipe, result = _made(record)
    notes = "; ".join(str(note) for note in evaluated.get("notes", ()))
    return Run(
        folder.resolve().name, recipe, "done", notes, result, evaluated, read(folder / "bench.json"),
        _mapping(record, "fingerprint"),
    )  # fmt: skip


def _made(record: Data) -> tuple[Data, Data]:
    """Recipe and result of a record; of a recovered folder those of the pruning, with what the recovery changed."""
    recipe, result = _mapping(record, "recipe"), _mapping(record, "result")
    if "pruned" not in record:
        return recipe, result
    first, before = _made(_mapping(record, "pruned"))
    # What was cut off is gone from the matrices whose zeros the recovery counts.
    cut = before.get("cut", _mapping(before, "sparsity").get("reached") if "shapes" in before else None) or 0.0
    zeros = result.get("sparsity")
    reached = cut + (1 - cut) * zeros if isinstance(zeros, float) else None
    blocks = [{key: block[key] for key in ("name", "sparsity")} for block in before.get("blocks") or ()]
    shares = {"sparsity": {"reached": reached}, "cut": cut}
    size = {"size": {**_mapping(before, "size"), **_mapping(result, "size")}}
    # Errors by block are of the pruned blocks; their sparsity is still theirs.
    found = {**before, **result, **shares, **size, "blocks": blocks}
    found["recovered"] = [*before.get("recovered", ()), str(result.get("method", "?"))]
    own = {"recover": recipe.get("recover")}
    return ({**first, **own} if first else {**recipe, "prune": {}}), found


def of_comparison(folder: Path) -> list[Run]:
    """The rows of a comparison as it was last asked for, those that failed or are still to come too."""
    runs = []
    for row in read(folder / "comparison.json").get("rows", ()):
        place = folder / "runs" / str(row["name"])
        found = read(place / "result.json")
        if row.get("failed"):
            runs.append(Run(str(row["name"]), _mapping(row, "recipe"), "failed", str(row["failed"])))
            continue
        if not found or row.get("key", found.get("key")) != found.get("key"):
            # Nothing, or what another recipe or version left in a folder of this name.
            runs.append(Run(str(row["name"]), _mapping(row, "recipe"), "open", "not made yet; compare again"))
            continue
        evaluated = found.get("evaluate") or {}
        why = found.get("why") or "; ".join(str(note) for note in evaluated.get("notes", ()))
        runs.append(
            Run(
                str(found["name"]), found["recipe"], str(found["status"]), str(why), found.get("prune") or {},
                evaluated, read(place / "bench.json"),
            )
        )  # fmt: skip
    return runs


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none.

    Raises:
        RecipeError: the file is there and is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise RecipeError(f"{path} cannot be read as JSON ({problem}); make it again.") from problem
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is no JSON object; make it again.")
    return data


def _mapping(record: Data, key: str) -> Data:
    found = record.get(key)
    return found if isinstance(found, Mapping) else {}
