"""Towers, blocks and matrices of any transformers model, read from its module tree.

A tower is an `nn.ModuleList` whose items are transformers' `GradientCheckpointingLayer`; its items are the blocks. In
transformers 5.23 that holds for all but a handful of legacy classes, for which the list can be named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from prunus.errors import ModelError, RecipeError, near
from prunus.models.experts import is_experts, stacks
from prunus.sites import Block, SiteInfo, Slot

# Left dense unless a recipe says otherwise: they choose the experts of every token, and are tiny.
IGNORED = ("*.router", "*.gate", "*.shared_expert_gate")

# A parameter that no site covers is worth a warning from this share of its block's weights on.
LARGE = 0.02


def find_blocks(model: nn.Module, ignore: Sequence[str] = (), blocks: str | None = None) -> list[Block]:
    """All blocks of all towers, in module order, with their prunable matrices.

    Args:
        model: a transformers model; its weights may be on the meta device.
        ignore: globs over dotted names of sites or of modules above them; what matches stays dense.
        blocks: dotted path of the one list of blocks to use, for models where none is found.

    Raises:
        ModelError: no list of blocks is found, two blocks share a module, or no matrix is left to prune.
        RecipeError: a glob matches nothing, or `blocks` does not name a list of modules.
    """
    lists = [blocks] if blocks else towers(model)
    if not lists:
        known = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)) or "none"
        raise ModelError(
            f"{type(model).__name__} has no list of transformer layers that prunus recognises. "
            f"Name it with --blocks PATH; lists in this model: {known}."
        )
    found = [_block(model, tower, index, module) for tower in lists for index, module in _items(model, tower)]
    _refuse_shared(found)
    _ignore(found, IGNORED, strict=False)
    _ignore(found, ignore, strict=True)
    if not any(block.slots for block in found):
        raise ModelError(f"No matrix is left to prune in {type(model).__name__}: everything is ignored or not linear.")
    return found


def uncovered(blocks: Iterable[Block]) -> list[tuple[str, int]]:
    """Large parameters inside blocks that no site covers and that therefore stay dense.

    Returns:
        `(dotted name, number of weights)` of every matrix or higher tensor above `LARGE` of its block's weights.
    """
    left = []
    for block in blocks:
        total = sum(parameter.numel() for parameter in block.module.parameters())
        covered = {slot.parameter for slot in block.slots} | block.ignored
        for name, parameter in block.module.named_parameters():
            path = f"{block.name}.{name}"
            if path not in covered and parameter.ndim > 1 and parameter.numel() > LARGE * total:
                left.append((path, parameter.numel()))
    return left


def towers(model: nn.Module) -> list[str]:
    """Dotted paths of the outermost lists whose items all are transformer layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower in found)
        items = list(module) if isinstance(module, nn.ModuleList) else []
        if items and not inside and all(isinstance(item, GradientCheckpointingLayer) for item in items):
            found.append(name)
    return found


def _items(model: nn.Module, tower: str) -> Iterator[tuple[int, nn.Module]]:
    modules = dict(model.named_modules())
    layers = modules.get(tower)
    if not isinstance(layers, nn.ModuleList):
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        raise RecipeError(f"--blocks {tower!r} is not a list of layers in this model.{near(tower, lists)}")
    yield from enumerate(layers)


def _block(model: nn.Module, tower: str, index: int, module: nn.Module) -> Block:
    name = f"{tower}.{index}"
    block = Block(name, tower, index, module)
    for path, child in module.named_modules():
        where = f"{name}.{path}" if path else name
        if isinstance(child, (nn.Linear, Conv1D)):
            transposed = isinstance(child, Conv1D)
            rows, columns = tuple(child.weight.shape)[:: -1 if transposed else 1]
            info = SiteInfo(where, name, (rows, columns))
            block.slots.append(Slot(info, f"{where}.weight", child, "weight", None, transposed))
        elif is_experts(child):
            block.slots.extend(stacks(child, where, name))
    return block


def _refuse_shared(blocks: Iterable[Block]) -> None:
    owners: dict[int, str] = {}
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            owner = owners.setdefault(id(parameter), block.name)
            if owner != block.name:
                raise ModelError(
                    f"{owner} and {block.name} share the weights of {block.name}.{name}: pruning one block would "
                    "change the other. Models that share layers between blocks are not supported."
                )


def _ignore(blocks: Iterable[Block], globs: Sequence[str], strict: bool) -> None:
    example = next((slot.info.name for block in blocks for slot in block.slots), "")
    used = set()
    for block in blocks:
        for slot in block.slots:
            used.update(glob for glob in globs if _matches(slot.info.name, glob))
        left = [slot for slot in block.slots if not any(_matches(slot.info.name, glob) for glob in globs)]
        block.ignored |= {slot.parameter for slot in block.slots if slot not in left}
        block.slots = left
    unused = [glob for glob in globs if glob not in used]
    if strict and unused:
        raise RecipeError(
            f"--ignore {unused[0]!r} matches no matrix of this model. Names look like {example!r}; "
            "`prunus inspect` lists them."
        )


def _matches(name: str, glob: str) -> bool:
    """True if the glob fits the site's name or the name of a module above it."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")
