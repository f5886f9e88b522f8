"""A folder of tensors in their own shapes, read against its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from prunus.errors import ModelError
from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks
from prunus.models.modelling import plain
from prunus.models.skeleton import config_of, skeleton_of
from prunus.models.source import read_config
from prunus.models.thin import multiplied, paired
from prunus.models.weights import disk_targets
from prunus.shapes.fit import BlockFit, Fitter
from prunus.sites import Block

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Shapes:
    """The sizes of all blocks of a folder.

    Attributes:
        folder: the folder.
        written: config.json with the global sizes, of the stock class.
        part: the key in it under which the sizes of these blocks stand; empty: they stand at its top.
        config: those sizes as an object.
        model: the class that it builds, on the meta device.
        blocks: dotted path of the list of blocks.
        fits: what makes each block differ.
        disk: the model's name of a tensor -> its name on disk.
        fitter: builds blocks on trial.
        ranks: matrix -> its rank, of those that lie there as two factors.
    """

    folder: Path
    written: dict[str, Any]
    part: str
    config: PreTrainedConfig
    model: PreTrainedModel
    blocks: str
    fits: list[BlockFit]
    disk: dict[str, str]
    fitter: Fitter
    ranks: dict[str, int]

    @property
    def common(self) -> dict[str, int] | None:
        """Widths that describe all blocks at once (a key may mean nothing to some of them); None if there are none."""
        union: dict[str, int] = {}
        for fit in self.fits:
            if any(union.get(key, value) != value for key, value in fit.widths.items()):
                return None
            union |= fit.widths
        for index, fit in enumerate(self.fits):
            if dict(fit.widths) != union and self.fitter.shapes(index, fit.widths) != self.fitter.shapes(index, union):
                return None
        return union

    @property
    def uniform(self) -> bool:
        """True if one configuration describes all blocks but for their biases."""
        return self.common is not None

    @property
    def plain(self) -> bool:
        """True if the configuration as it stands describes all blocks."""
        return not self.ranks and not any(fit.widths or fit.biases for fit in self.fits)

    def stored(self, name: str) -> str:
        """The name on disk of a tensor, which may be a new bias of a module that is there."""
        if name in self.disk:
            return self.disk[name]
        return self.disk[f"{name.removesuffix('.bias')}.weight"].removesuffix("weight") + "bias"

    @property
    def biases(self) -> list[str]:
        """Modules of all blocks with a bias that the class does not give them."""
        return [f"{self.blocks}.{index}.{name}" for index, fit in enumerate(self.fits) for name in fit.biases]

    @property
    def per_layer(self) -> dict[str, dict[str, int]]:
        """Transformers' `per_layer_config`."""
        digits = len(str(len(self.fits) - 1))
        return {f"{index:0{digits}}": dict(fit.widths) for index, fit in enumerate(self.fits) if fit.widths}


def read_shapes(folder: Path) -> Shapes:
    """Explain every block of a folder; of a model with several lists of blocks, those of the list that was narrowed.

    Raises:
        ModelError: several lists of blocks differ from what the configuration says.
        FormatError: some block's tensors fit no widths of the configuration.
    """
    written = plain(read_config(folder))
    whole = config_of(written)
    model = skeleton_of(whole, folder)
    checkpoint = Checkpoint.open(folder)
    disk, stacks = _names(model, checkpoint)
    tensors = {name: checkpoint.tensors[stored].shape for name, stored in disk.items()}
    ranks = paired(tensors, model)
    tensors = multiplied(tensors, ranks, model)
    blocks = _narrowed(folder, model, tensors)
    part, config = _part(whole, blocks[0].tower)
    fitter = Fitter(type(blocks[0].module), config)
    fits = []
    for block in blocks:
        prefix = f"{block.name}."
        own = {name.removeprefix(prefix): shape for name, shape in tensors.items() if name.startswith(prefix)}
        experts = {name.removeprefix(prefix): count for name, count in stacks.items() if name.startswith(prefix)}
        fits.append(fitter(block.name, block.index, own, experts))
    return Shapes(folder, written, part, config, model, blocks[0].tower, fits, disk, fitter, ranks)


def _narrowed(folder: Path, model: PreTrainedModel, tensors: Mapping[str, tuple[int, ...]]) -> list[Block]:
    """The blocks of the one tower whose tensors have other shapes than the model's; of the last one if none has."""
    built = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    blocks = find_blocks(model)
    towers = list(dict.fromkeys(block.tower for block in blocks))
    odd = [tower for tower in towers if any(
        built.get(name) != shape for name, shape in tensors.items() if name.startswith(f"{tower}.")
    )]  # fmt: skip
    if len(odd) > 1:
        raise ModelError(f"{folder}: blocks of {' and '.join(odd)} were made smaller; one list of blocks can be.")
    chosen = (odd or towers)[-1]
    return [block for block in blocks if block.tower == chosen]


def _part(whole: PreTrainedConfig, tower: str) -> tuple[str, PreTrainedConfig]:
    """Where the sizes of a tower stand: in the part of the configuration that its path names, else in that of text."""
    parts = {name: value for name, value in vars(whole).items() if isinstance(value, PreTrainedConfig)}
    named = [name for name in parts if name.removesuffix("_config") in tower]
    text = whole.get_text_config()
    if named:
        return named[0], parts[named[0]]
    return next(((name, value) for name, value in parts.items() if value is text), ("", whole))


def _names(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, int]]:
    """The model's own names -> the names on disk; and stacks of experts that lie there one by one -> how many."""
    names, converted = disk_targets(model, checkpoint.tensors, get_model_conversion_mapping(model))
    plain = {targets[0]: name for name, targets in names.items() if name not in converted}
    stacks: dict[str, int] = {}
    for name in converted:
        number = EXPERT.search(name)
        if number is None:
            raise ModelError(f"{name}: transformers converts it while loading in a way that widths are not read from.")
        for target in names[name]:
            stacks[target] = max(stacks.get(target, 0), int(number[1]) + 1)
    return plain, stacks
