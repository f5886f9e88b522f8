"""What a run would do, from shapes, headers and the text: no weight is read."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from prunus import memory
from prunus.allocations import Allocation, Survey
from prunus.budget import share
from prunus.data.calibration import LENGTH, SAMPLES, check
from prunus.data.reading import on_hub
from prunus.data.tokens import folder_positions, head_token, load_tokenizer
from prunus.evaluation.loading import check_device
from prunus.evidence import AnyNeeds, of_gradients
from prunus.job import BATCH_TOKENS, check_out, dtype_of, sites_of, tokens_of
from prunus.methods.elementwise import Elementwise
from prunus.methods.shape import Shape
from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks, uncovered
from prunus.models.fitted import as_stored
from prunus.models.skeleton import parameter_count
from prunus.models.source import locate
from prunus.models.weights import Weights
from prunus.notes import collecting
from prunus.recipe import Recipe
from prunus.sites import Block, SiteInfo
from prunus.statistics import Gram

# Seconds that the machine's speed is measured for, and how much of it a forward pass reaches.
PROBE_SECONDS = 0.2
REACHED = 0.6


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `prune` would do with the same recipe.

    Args:
        recipe: `out` may be missing; then the disk of the current folder is looked at.

    Returns:
        `model, method, metric, update, pattern, allocation, sparsity.wanted, parameters, sites.{count, parameters,
        share}, budget` ("uniform", "per block", or a sentence when it is decided by a pass over the dense model),
        `blocks[].{name, matrices, parameters, sparsity}`, `left_alone.{outside, inside, ignored, uncovered}`,
        `calibration`, `memory.{terms, total}` in bytes, `disk.{needed, free, where}`, `time.{seconds, basis}`,
        `notes` (what the user should know beforehand).

    Raises:
        PrunusError: whatever `prune` would refuse before its first block.
    """
    notes: list[str] = []
    with collecting(notes):
        return {**_plan(recipe, notes), "notes": notes}


def _plan(recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    """Everything but the notes, which are added to as they come up."""
    method, allocation = recipe.build()
    device = check_device(recipe.device)
    folder = locate(recipe.model, trust_remote_code=recipe.trust_remote_code)
    if recipe.out is not None:
        check_out(Path(recipe.out), folder, overwrite=True)
        if Path(recipe.out).exists():
            notes.append(f"OUT {recipe.out} exists; prune replaces it only with --overwrite.")
    checkpoint = Checkpoint.open(folder)
    model = as_stored(checkpoint, dtype_of(recipe.dtype, device, checkpoint), recipe.trust_remote_code)
    blocks = sites_of(recipe, model, method)
    sparsity = share(recipe.prune, method, Weights(model, checkpoint, device), blocks)
    sites = [info for block in blocks for info in block.infos]
    parameters = parameter_count(model)
    calibration = _calibration(recipe, folder, model)
    # Without need for data the text is checked all the same: its first tokens are what a run is verified with.
    needs = method.needs | allocation.needs
    calibration = calibration if needs else None
    tokens = calibration["samples"] * calibration["length"] if calibration else 0
    size = sum(info.size for info in sites)
    return {
        "model": recipe.model,
        **{name: getattr(recipe.prune, name) for name in ("method", "metric", "update", "pattern", "allocation")},
        "sparsity": {"wanted": None if recipe.prune.speedup else sparsity},
        "parameters": parameters,
        "sites": {"count": len(sites), "parameters": size, "share": size / parameters},
        **_budget(blocks, method, allocation, sparsity, recipe.prune.speedup),
        "left_alone": _left_alone(model, blocks, recipe),
        "calibration": calibration,
        "memory": _memory(model, blocks, checkpoint, needs, tokens, calibration["length"] if calibration else 0),
        "disk": _disk(recipe, checkpoint.bytes + memory.scratch(model, blocks, needs, tokens)),
        "time": _time(blocks, method, allocation, tokens, device),
        **({"shapes": {"kinds": list(method.touches)}} if isinstance(method, Shape) else {}),
    }


def _calibration(recipe: Recipe, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """How much text will be looked at. It is read as the run will read it; a data set of the hub is not fetched."""
    part, limit = recipe.calibration, folder_positions(folder)
    asked = {"source": part.source, "seed": part.seed, "bos": part.bos}
    if on_hub(part.source):
        check(part.samples, part.length, part.seed, part.bos, limit)
        head_token(load_tokenizer(folder), part.bos)
        length = part.length or (LENGTH if limit is None else min(LENGTH, limit))
        return {**asked, "samples": part.samples or SAMPLES, "length": length}
    found = tokens_of(recipe, folder, model)
    return {**asked, "samples": found.samples, "length": found.length, "bos": found.bos}


class _Foreseen:
    """Stands for the survey of the dense model where an allocation looks at nothing but the sites."""

    def __init__(self, sites: list[SiteInfo]):
        self.sites = sites

    def measure(self, function: Any, needs: frozenset[type] = frozenset()) -> Any:
        """There is nothing to measure in a plan."""
        raise AssertionError("an allocation that calls itself foreseeable measures")


def _budget(
    blocks: Sequence[Block],
    method: Elementwise | Shape,
    allocation: Allocation,
    sparsity: float,
    speedup: float | None,
) -> dict[str, Any]:
    """The budget of each block where the allocation can tell it from the sites alone, else how it will be found."""
    sites = [info for block in blocks for info in block.infos]
    rows = [
        {"name": block.name, "matrices": len(block.infos), "parameters": sum(info.size for info in block.infos)}
        for block in blocks
    ]
    if isinstance(method, Shape):
        groups = "ranks" if "ranks" in method.touches else f"groups of {' and '.join(method.touches)}"
        what = groups if method.touches else "whole blocks"
        amount = f"{100 * sparsity:.2f} % of all"
        if speedup:
            amount = f"what stand-ins of smaller shapes, timed when the run begins, say about {speedup:g} x in decoding"
        sentence = f"the method chooses which {what} go, to {amount}"
        return {"budget": sentence, "blocks": [{**row, "sparsity": None} for row in rows]}
    if not allocation.foreseeable:
        source = "the calibration text" if allocation.needs else "the weights"
        sentence = f"decided by a first pass over {source}, to {100 * sparsity:.2f} % of all"
        if method.pattern.grouped:
            sentence += f", in whole weights of every {method.pattern.align}: small differences round away"
        return {"budget": sentence, "blocks": [{**row, "sparsity": None} for row in rows]}
    divided = allocation.divide(cast(Survey, _Foreseen(sites)), sparsity)
    divided = method.pattern.settle(divided, {info.name: info.size for info in sites}, sparsity)
    for row, block in zip(rows, blocks, strict=True):
        gone = sum(divided[info.name] * info.size for info in block.infos)
        row["sparsity"] = gone / row["parameters"] if row["parameters"] else 0.0
    shares = [row["sparsity"] for row in rows if row["parameters"]]
    return {"budget": "uniform" if max(shares) - min(shares) < 1e-9 else "per block", "blocks": rows}


def _left_alone(model: PreTrainedModel, blocks: Sequence[Block], recipe: Recipe) -> dict[str, Any]:
    """Parameters outside the blocks, those inside that are no site, ignored matrices, large ones that nobody covers."""
    inside = sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
    kept = {info.name for block in blocks for info in block.infos}
    everything = find_blocks(model, (), recipe.prune.blocks) if recipe.prune.ignore else blocks
    return {
        "outside": parameter_count(model) - inside,
        "inside": inside - sum(info.size for block in blocks for info in block.infos),
        "ignored": [info.name for block in everything for info in block.infos if info.name not in kept],
        "uncovered": [(name, size) for name, size in uncovered(everything)],
    }


def _memory(
    model: PreTrainedModel, blocks: Sequence[Block], checkpoint: Checkpoint, needs: AnyNeeds, tokens: int, length: int
) -> dict[str, Any]:
    """The terms of the peak, which sum up to it."""
    found = memory.predict(
        model,
        blocks,
        checkpoint,
        needs=needs,
        tokens=tokens,
        batch_tokens=length if of_gradients(needs) else min(BATCH_TOKENS, tokens),
        length=length,
    )
    terms = {name: value for name, value in found.items() if name != "peak"}
    together = sum(value for name, value in terms.items() if name not in ("outside", "interpreter"))
    # The larger of the two is the peak; the other is gone, or not yet there, when it is reached.
    smaller = (
        [name for name in terms if name not in ("outside", "interpreter")]
        if terms["outside"] > together
        else ["outside"]
    )
    return {"terms": {name: value for name, value in terms.items() if name not in smaller}, "total": found["peak"]}


def _disk(recipe: Recipe, needed: int) -> dict[str, Any]:
    """Bytes that OUT (as many as the dense model) and gradients will take, and those free where they will lie."""
    where = Path(recipe.out).absolute().parent if recipe.out else Path.cwd()
    while not where.exists():
        where = where.parent
    return {"needed": needed, "free": shutil.disk_usage(where).free, "where": str(where)}


def _time(
    blocks: Sequence[Block], method: Elementwise | Shape, allocation: Allocation, tokens: int, device: torch.device
) -> dict[str, Any]:
    """Operations of the walk over the machine's measured speed; experts are counted as if each saw every token.

    Reading the model, writing and reloading the result are not in it: they take seconds for small models, and as long
    as the disk needs for large ones.
    """
    if device.type != "cpu":
        return {"seconds": None, "basis": "unknown before the first block on this device"}
    if any(kind.source == "trials" for kind in allocation.needs):
        return {"seconds": None, "basis": "mostly that of the allocation's trials on the whole model; its settings say"}
    gradients = of_gradients(method.needs | allocation.needs)
    walks = 2 * bool(method.needs - gradients) + bool(allocation.needs - gradients)
    # Forward, forward again, and a backward of twice the work.
    walks += 4 * any(kind.source == "loss" for kind in gradients) + 3 * any(
        kind.source == "output" for kind in gradients
    )
    operations = sum(walks * 2.0 * info.size * tokens for block in blocks for info in block.infos)
    if Gram in method.needs:
        operations += sum(_solving(block, tokens) for block in blocks)
    if not operations:
        return {"seconds": None, "basis": "no forward pass: as long as the weights take to be read and written"}
    speed = _speed()
    basis = (
        f"an estimate without reading and reloading: {operations / 1e12:.2g} Tflop, and products of matrices reach "
        f"{speed / 1e9:.0f} Gflop/s here"
    )
    return {"seconds": operations / (REACHED * speed), "basis": basis}


def _solving(block: Block, tokens: int) -> float:
    """Gram sums (one for each parent and width), their factors, and the sweeps."""
    inputs = Counter((info.name.rpartition(".")[0], info.shape[1]) for info in block.infos)
    grams = sum(columns**2 * tokens + 2.0 * columns**3 for _, columns in inputs)
    return grams + sum(float(info.size) * info.shape[1] for info in block.infos)


def _speed() -> float:
    """Operations a second of a float32 product of 512 x 512 matrices, measured for a moment."""
    one = torch.ones(512, 512)
    torch.matmul(one, one)
    begun, products = time.perf_counter(), 0
    while time.perf_counter() - begun < PROBE_SECONDS:
        torch.matmul(one, one)
        products += 1
    return products * 2 * 512**3 / (time.perf_counter() - begun)
