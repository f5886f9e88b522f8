"""The command line as Python functions, with the same names, defaults and checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from prunus.progress import Progress
from prunus.recipe import EvaluatePart, Recipe, Setting, load_recipe
from prunus.recipe_options import EVALUATE_PLACES, from_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

When = Literal["auto", "always", "never"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Options(TypedDict, total=False):
    """Keyword arguments of `prune` and `plan`; each has the default that `prunus prune --help` names.

    Attributes:
        preset: fast, balanced or best; instead of a method.
        method: a row of `prunus.catalogue()` of kind method.
        sparsity: share of the blocks' weights to remove, in [0, 1).
        params: instead of a sparsity, parameters to keep, such as "100M" (methods for shapes).
        size: instead of a sparsity, bytes to keep, such as "80MB" (methods for shapes).
        speedup: instead of a sparsity, how many times as fast to decode on this machine (methods for widths and depth).
        portable: all blocks of one shape that a stock class of transformers holds (methods for shapes).
        round_to: neurons or ranks in multiples of this (methods for widths, low rank).
        pattern: "unstructured", "N:M" with N kept of every M consecutive inputs, or "capped:K/M" with at most K.
        allocation: how the sparsity is divided over the blocks.
        metric: scores the weights instead of the method's own.
        update: corrects the kept weights instead of the method's own.
        settings: hyper-parameters, `{"update.damp": 0.01}`.
        ignore: globs of matrix names to leave alone.
        blocks: path of the list of blocks in the model.
        compat: "exact", or "reference" for the published code's rounding.
        calibration: text by name, or a file.
        samples: sequences drawn from it.
        length: tokens in each.
        seed: of the draw.
        bos: begin each sequence with the BOS token.
        device: where blocks are computed.
        dtype: number format of the forward passes.
        trust_remote_code: run Python code from the model's folder.
        max_ppl_ratio: publish nothing if the perplexity is more than so many times the dense model's.
        recipe: YAML that supplies the rest.
    """

    preset: str
    method: str
    sparsity: float
    params: str
    size: str
    speedup: float
    portable: bool
    round_to: int
    pattern: str
    allocation: str
    metric: str
    update: str
    settings: dict[str, Setting]
    ignore: list[str]
    blocks: str
    compat: Literal["exact", "reference"]
    calibration: str | Path
    samples: int
    length: int
    seed: int
    bos: When
    device: str
    dtype: Dtype
    trust_remote_code: bool
    max_ppl_ratio: float
    recipe: str | Path


def prune(
    model: str | Path,
    out: str | Path,
    *,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Prune `model` into the new folder `out`; called again after an interruption it continues.

    Args:
        model: a folder, a hub id, a .gguf file or an alias such as smollm2.
        out: the folder for the pruned checkpoint.
        restart: forget an unfinished run of this `out`.
        overwrite: replace an existing `out`, once the new one is complete.
        progress: told about every block; nothing is printed unless given.
        **options: see `Options`.

    Returns:
        What `prunus prune --json` prints.

    Raises:
        PrunusError: something about the options, the model, the text or the place to write to does not do.
    """
    from prunus.engine import prune as engine

    return engine(_recipe(model, out, options), Path(out), restart=restart, overwrite=overwrite, progress=progress)


def plan(model: str | Path, out: str | Path | None = None, **options: Unpack[Options]) -> dict[str, Any]:
    """What `prune` with the same arguments would do; reads no weights. Returns what `prunus plan --json` prints."""
    from prunus.planning import plan as foretell

    return foretell(_recipe(model, out, options))


def recover(
    model: str | Path,
    out: str | Path,
    *,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Retrain the pruned `model` into the new folder `out`, with every pruned weight still zero.

    Args:
        model: a pruned folder, of prunus or foreign.
        out: the folder for the result.
        restart: forget an unfinished run of this `out`.
        overwrite: replace an existing `out`, once the new one is complete.
        progress: told about every step; nothing is printed unless given.
        **options: the options of `prunus recover` by name, such as `method="masklora", minutes=30`; hyper-parameters
            as `settings={"rank": 32}`.

    Returns:
        What `prunus recover --json` prints.

    Raises:
        PrunusError: something about the options, the model, the text or the place to write to does not do.
    """
    from prunus.recipe_options import RECOVER_PLACES
    from prunus.recovery.run import recover as work

    given = {"method": "reconstruct", **options, "model": str(model), "out": str(out)}
    recipe = from_options(given, places=RECOVER_PLACES)
    return work(recipe, Path(out), restart=restart, overwrite=overwrite, progress=progress)


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    verify: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge a LoRA adapter into the pruned `model` without losing a zero. Returns what `prunus merge --json` prints."""
    from prunus.recovery.merge import merge as work

    return work(model, adapter, out, verify=verify, restart=restart, overwrite=overwrite, progress=progress)


def evaluate(  # noqa: PLR0913 - the options of the command
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | Path = "wikitext2",
    length: int = 1024,
    windows: int | None = None,
    bos: When = "auto",
    sample: str | None = None,
    tasks: Sequence[str] | str = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` on a text, lower is better; with `baseline`, that model's too, on the same windows.

    Args:
        model: a folder, a hub id, a .gguf file or an alias.
        baseline: evaluated first, usually the dense model; with `tasks` it is found by itself where it is known.
        text: "wikitext2" (its test split), a file, or "none" for `tasks` alone.
        length: tokens in each window, at least 2; part of the result.
        windows: only the first so many.
        bos: begin each window with the BOS token.
        sample: a prompt that each model continues by one sentence.
        tasks: benchmark tasks of lm-eval by name, or "owl7".
        task_data: folder with TASK.jsonl files; the hub's data sets unless given.
        limit: only the first so many items of each task.
        batch: requests of tasks in one forward pass.
        device: where to compute.
        dtype: number format to compute in.
        trust_remote_code: run Python code from the models' folders.
        progress: told about every window.

    Returns:
        What `prunus evaluate --json` prints.

    Raises:
        PrunusError: an option is out of range, or the model or the text cannot be used.
    """
    from prunus.evaluation.perplexity import evaluate as measure

    given = {"model": str(model), "text": str(text), "length": length, "windows": windows, "bos": bos, "sample": sample}
    given |= {"tasks": tasks if isinstance(tasks, str) else list(tasks), "limit": limit, "batch": batch}
    given |= {"task_data": None if task_data is None else str(task_data)}
    recipe = from_options({**given, "device": device, "dtype": dtype}, places=EVALUATE_PLACES)
    part = (recipe.evaluate or EvaluatePart()).asked()
    machine = {"device": recipe.device, "dtype": recipe.dtype, "trust_remote_code": trust_remote_code}
    return measure(model, baseline=baseline, progress=progress, **part, **machine)


def inspect(model: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Sparsity by block and matrix, and the N:M patterns that hold. Returns what `prunus inspect --json` prints."""
    from prunus.inspection import inspect as look
    from prunus.models.source import find

    return look(find(model), progress=progress)


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    portable: bool = False,
    type: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model` in a form that another tool runs, checked by loading it again. Arguments as `prunus export --help`.

    Returns:
        What `prunus export --json` prints.

    Raises:
        PrunusError: the form cannot carry the model's shape (the sentence says what could), or OUT cannot be written.
    """
    from prunus.formats import Settings
    from prunus.formats.run import export as write

    settings = Settings(portable, type, trust_remote_code)
    return write(model, out, format, settings, overwrite=overwrite, progress=progress)


def load(model: str | Path, *, device: str = "cpu", dtype: Dtype = "auto", trust_remote_code: bool = False) -> Any:
    """The transformers model in any folder that prunus made, ready to generate. See `loading.load`."""
    from prunus.loading import load as read

    return read(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def compare(
    recipes: Sequence[str | Path] = (),
    *,
    out: str | Path,
    models: Sequence[str | Path] = (),
    keep: bool = False,
    restart: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run many recipes and set them side by side in `out`; called again after an interruption it continues.

    Args:
        recipes: YAML files; none: the defaults and `options`.
        out: folder of the comparison: table.csv, report.html, and a folder of data for each row.
        models: instead of the recipes' own; every recipe meets every model.
        keep: leave the pruned checkpoints in `out`/runs.
        restart: make every row anew.
        ray: address of a Ray cluster to run rows on.
        progress: told about every step.
        **options: those of `prune`, of which method, metric, update, pattern, sparsity, allocation, compat, samples,
            length and seed may be lists; and text, eval_length, windows, sample, tasks, task_data, limit and batch.

    Returns:
        What `prunus compare --json` prints.

    Raises:
        PrunusError: a recipe cannot be, `out` cannot be used, or no row could be made.
    """
    from prunus.comparison.grid import entries
    from prunus.comparison.run import compare as run_all

    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    wanted = entries(list(recipes), models=[str(model) for model in models], options=given)
    return run_all(wanted, Path(out), keep=keep, restart=restart, ray=ray, progress=progress)


def catalogue() -> list[dict[str, Any]]:
    """Every method, metric, update, pattern and allocation: `name, kind, paper, needs, defaults`."""
    from prunus.methods.catalogue import rows

    return rows()


def run(
    recipe: str | Path | Recipe, *, restart: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """All stages of a recipe, given as YAML file or object; those already done are skipped. See `stages.run`."""
    from prunus.stages import run as run_stages

    wanted = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return run_stages(wanted, restart=restart, overwrite=overwrite, progress=progress)


def _recipe(model: str | Path, out: str | Path | None, options: Options) -> Recipe:
    given: dict[str, Any] = {"model": str(model), "out": None if out is None else str(out), **options}
    file = given.pop("recipe", None)
    if "calibration" in given:
        given["calibration"] = str(given["calibration"])
    return from_options(given, file=file)
