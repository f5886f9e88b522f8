"""Everything that can be checked or refused before the work begins, gathered in one plain value."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunus import memory
from prunus.allocations import Allocation
from prunus.budget import share
from prunus.data.calibration import Calibration, calibrate
from prunus.data.tokens import folder_positions
from prunus.distributed import Processes, local_device
from prunus.errors import CalibrationError, RecipeError
from prunus.evaluation.loading import check_device
from prunus.evidence import of_gradients
from prunus.methods.elementwise import Elementwise
from prunus.methods.shape import Shape
from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks, uncovered
from prunus.models.fitted import as_stored
from prunus.models.skeleton import parameter_count
from prunus.models.source import locate
from prunus.models.weights import Weights
from prunus.recipe import Recipe
from prunus.sites import Block
from prunus.statistics import ORDERED
from prunus.stream import Batch, Stream
from prunus.versions import decisive, versions
from prunus.work import Work

# Tokens in one forward pass: enough to keep matrix products busy, little enough to keep activations small.
BATCH_TOKENS = 2048

# Tokens of the probe that goes through all blocks and is compared after reloading.
PROBE_TOKENS = 32


@dataclass
class Job:
    """A run that passed all checks.

    Attributes:
        recipe: what was asked.
        out: where the result goes.
        overwrite: whether it may replace what is there.
        work: the unfinished state beside it.
        checkpoint: the dense model's files.
        stream: the model and its blocks.
        method: decides about sites.
        allocation: divides the sparsity.
        calibration: the tokens and where they come from.
        batches: this process's share of them, the probe last.
        device: where blocks are computed.
        predicted: the terms of the peak memory, bytes.
        processes: this process among its peers.
        sparsity: share of the weights of all blocks' matrices to remove.
        parameters: number of the dense model's weights, tied ones once.
        warnings: what the user should know.
        resumed: number of blocks that an earlier call had finished.
    """

    recipe: Recipe
    out: Path
    overwrite: bool
    work: Work
    checkpoint: Checkpoint
    stream: Stream
    method: Elementwise | Shape
    allocation: Allocation
    calibration: Calibration
    batches: list[Batch]
    device: torch.device
    predicted: dict[str, int]
    processes: Processes
    sparsity: float
    parameters: int
    warnings: list[str]
    resumed: int = 0

    @property
    def folder(self) -> Path:
        """The dense model."""
        return self.checkpoint.folder

    @property
    def needs(self) -> frozenset[type]:
        """Statistics that any part of the run reads."""
        return self.method.needs | self.allocation.needs

    @property
    def probe(self) -> Batch:
        """The few tokens whose logits are compared after reloading."""
        return self.batches[-1]

    @property
    def dtype_name(self) -> str:
        """Dtype that blocks are computed in."""
        return str(self.stream.model.dtype).removeprefix("torch.")

    @property
    def calibration_summary(self) -> dict[str, Any]:
        """Where the calibration tokens come from, and whether the method looked at them."""
        one = self.calibration
        used = bool(self.needs)
        return {
            "source": one.source, "samples": one.samples, "length": one.length, "seed": one.seed,
            "sha256": one.sha256, "bos": one.bos, "used": used,
        }  # fmt: skip

    @property
    def versions(self) -> dict[str, str]:
        """Versions of all that has a say in the numbers."""
        return versions()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the result to the last bit; an unfinished run is only continued under the same."""
        recipe = {name: value for name, value in self.recipe.resolved().items() if name not in ("out", "evaluate")}
        return {
            "recipe": json.loads(json.dumps(recipe)),
            "model": self.checkpoint.identity,
            "calibration": self.calibration.sha256,
            "files": named_files(self.recipe),
            "versions": decisive(),
            # The order of summation, and with it the last bits, depends on these.
            "device": self.device.type, "threads": torch.get_num_threads(), "processes": self.processes.world,
        }  # fmt: skip

    def begin(self, restart: bool) -> None:
        """Take the work folder and see that the disk is large enough.

        Raises:
            RecipeError: the disk is too small, the folder is taken, or it holds another unfinished run.
        """
        continued = self.work.begin(self.fingerprint, restart)
        written = [file for folder in (self.work.checkpoint, self.work.reverse) for file in folder.iterdir()]
        tokens = self.calibration.samples * self.calibration.length
        scratch = memory.scratch(self.stream.model, self.stream.blocks, self.needs, tokens)
        need = int(self.checkpoint.bytes * 1.02) + scratch - sum(file.stat().st_size for file in written)
        free = shutil.disk_usage(self.work.folder).free
        if need > free:
            self.work.close(remove=not continued)
            raise RecipeError(
                f"{self.out.parent} has {free / 1e9:.1f} GB free and this run needs {need / 1e9:.1f} GB more. "
                "Free some space or choose another place."
            )


def named_files(recipe: Recipe) -> dict[str, str]:
    """Setting → sha256 of the file that it names, such as a map of sparsities."""
    named = {key: Path(value) for key, value in recipe.prune.settings.items() if isinstance(value, str)}
    return {key: sha256(path.read_bytes()).hexdigest() for key, path in named.items() if path.is_file()}


def identity(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a result depends on besides its recipe, found without building the model.

    Returns:
        `model`, `calibration` and `files`, each as in a fingerprint.
    """
    found = tokens_of(recipe, folder, None)
    return {"model": Checkpoint.open(folder).identity, "calibration": found.sha256, "files": named_files(recipe)}


def prepare(recipe: Recipe, out: Path, *, overwrite: bool, processes: Processes, warnings: list[str]) -> Job:
    """Check everything that can be checked before the first block is loaded.

    Args:
        recipe: what was asked.
        out: absolute path of the folder to make.
        overwrite: whether it may replace another.
        processes: this process among its peers.
        warnings: receives what the user should know.

    Raises:
        PrunusError: something about the recipe, the model, the text or the output does not do.
    """
    method, allocation = recipe.build()
    device = check_device(str(local_device(recipe.device)))
    folder = locate(recipe.model, trust_remote_code=recipe.trust_remote_code)
    work = Work(out)
    check_out(out, folder, overwrite or work.published)
    checkpoint = Checkpoint.open(folder)
    model = as_stored(checkpoint, dtype_of(recipe.dtype, device, checkpoint), recipe.trust_remote_code)
    blocks = sites_of(recipe, model, method)
    calibration = tokens_of(recipe, folder, model)
    needs = method.needs | allocation.needs
    if processes.world > 1 and needs & ORDERED:
        raise RecipeError(
            f"The published sum of --compat reference depends on the order of the sequences, which {processes.world} "
            "processes would share. Start one process, or leave --compat out."
        )
    alone = bool(of_gradients(needs))
    batches = _batches(calibration, processes, alone)
    weights = Weights(model, checkpoint, device)
    sparsity = share(recipe.prune, method, weights, blocks)
    stream = Stream(model, weights, blocks, processes)
    warnings.extend(
        f"{name} ({size:,} weights) is not linear in a way that prunus knows and stays dense."
        for name, size in _summary(uncovered(blocks))
    )
    predicted = memory.predict(
        model,
        blocks,
        checkpoint,
        needs=needs,
        tokens=sum(batch.samples for batch in batches) * calibration.length if needs else 0,
        batch_tokens=calibration.length if alone else min(BATCH_TOKENS, calibration.samples * calibration.length),
        length=calibration.length,
    )
    return Job(
        recipe, out, overwrite, work, checkpoint, stream, method, allocation, calibration, batches, device, predicted,
        processes, sparsity, parameter_count(model), warnings,
    )  # fmt: skip


def check_out(out: Path, model: Path, overwrite: bool) -> None:
    """See that OUT may be written.

    Raises:
        RecipeError: it exists, is not a folder, lies inside the model (or the other way round) or cannot be written.
    """
    place, source = out.resolve(), model.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise RecipeError(f"OUT {out} is, holds or lies inside the model's folder {model}; choose another place.")
    if place == Path(place.root) or os.path.ismount(place):
        raise RecipeError(f"OUT {out} is a mount point, which cannot be replaced as a whole; name a folder inside it.")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"OUT {out} is a file; choose another name.")
    if out.exists() and not overwrite:
        raise RecipeError(f"OUT {out} exists. Choose another name, or add --overwrite to replace it.")
    model_like = any((out / name).is_file() for name in ("config.json", "prunus.json"))
    if out.exists() and any(out.iterdir()) and not model_like:
        raise RecipeError(f"OUT {out} holds files but no model; --overwrite replaces models only. Choose another name.")
    ancestor = next(folder for folder in place.parents if folder.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise RecipeError(f"OUT {out} cannot be written: {ancestor} is no writable folder. Choose another place.")


def dtype_of(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype to compute in. `auto`: float32 on CPUs, which is exact and mostly faster there; else as stored."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    size: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        size[stored.dtype] += stored.bytes if stored.dtype.is_floating_point else 0
    return size.most_common(1)[0][0]


def sites_of(recipe: Recipe, model: PreTrainedModel, method: Elementwise | Shape) -> list[Block]:
    """The blocks of the model with the matrices that the recipe leaves.

    Raises:
        RecipeError: a glob matches nothing, or matrices do not fit the pattern.
        ModelError: the model has no blocks that prunus recognises.
    """
    blocks = find_blocks(model, recipe.prune.ignore, recipe.prune.blocks)
    refusals = []
    for info in (info for block in blocks for info in block.infos):
        try:
            method.check(info)
        except RecipeError as refusal:
            refusals.append(str(refusal))
    if refusals:
        others = f" So it is with {len(refusals) - 1} more matrices." if len(refusals) > 1 else ""
        raise RecipeError(refusals[0] + others)
    return blocks


def tokens_of(recipe: Recipe, folder: Path, model: PreTrainedModel | None) -> Calibration:
    """The calibration samples of a recipe; without a model its vocabulary is not checked.

    Raises:
        PrunusError: as `calibrate`; also if the text lacks the model's main input.
    """
    part = recipe.calibration
    text = model.config.get_text_config() if model is not None else None
    found = calibrate(
        part.source, folder, samples=part.samples, length=part.length, seed=part.seed, bos=part.bos,
        vocabulary=getattr(text, "vocab_size", None), limit=folder_positions(folder),
    )  # fmt: skip
    wanted = model.main_input_name if model is not None else "input_ids"
    if model is not None and wanted not in found.inputs and "input_ids" not in found.inputs:
        raise CalibrationError(f"{part.source} has no {wanted!r}, which {type(model).__name__} needs.")
    return found


def _batches(calibration: Calibration, processes: Processes, alone: bool) -> list[Batch]:
    """This process's share of the samples in batches, or each sample `alone`, and the probe."""
    inputs = calibration.inputs
    # Without token ids (images alone) the tokens of a sample are not known yet: one sample at a time.
    rows = max(1, BATCH_TOKENS // calibration.length) if calibration.length and not alone else 1
    starts = list(range(0, calibration.samples, rows))
    if len(starts) < processes.world:
        raise CalibrationError(
            f"{processes.world} processes need as many batches of {rows} samples, and there are {len(starts)}. "
            f"Give at least {rows * processes.world} samples or start fewer processes."
        )
    cut = [{name: value[start : start + rows] for name, value in inputs.items()} for start in processes.mine(starts)]
    batches = [Batch(part, len(next(iter(part.values())))) for part in cut]
    return [*batches, Batch({name: _head(value, calibration.length) for name, value in inputs.items()}, 0)]


def _head(value: Tensor, length: int) -> Tensor:
    """The first sample; of tokens, the first few."""
    sequence = value.ndim == 2 and value.shape[1] == length
    return value[:1, :PROBE_TOKENS].clone() if sequence else value[:1].clone()


def _summary(found: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """One entry for all parameters that differ only in the block's number."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, size in found:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault(pattern, []).append((name, size))
    return [
        (pattern if len(members) > 1 else members[0][0], sum(size for _, size in members))
        for pattern, members in groups.items()
    ]
