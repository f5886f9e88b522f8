"""Which equal shapes of a model some stock class of transformers holds, asked before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prunus.errors import FormatError, RecipeError
from prunus.shapes.fit import Shape
from prunus.shapes.folder import read_shapes
from prunus.shapes.stock import find_stock
from prunus.sites import Block, Member, Width


class Legal:
    """Answers for one model; every number of heads is looked up once.

    Attributes:
        blocks: with the widths that will be narrowed.
        biases: whether the matrices that read a width get a bias.
    """

    def __init__(self, folder: Path, blocks: Sequence[Block], biases: bool):
        """Read the shapes of the model.

        Raises:
            RecipeError: its blocks differ already.
        """
        self.blocks = [block for block in blocks if block.widths]
        self.biases = biases
        self._shapes = read_shapes(folder)
        self._known: dict[int | None, str] = {}
        odd = next((width for width in self._widths if width.groups != self._first(width).groups), None)
        if odd is not None or not self._shapes.uniform:
            raise RecipeError(
                f"--portable: the blocks of {folder} differ in shape already. prunus export {folder} NEW --portable "
                "fills them up to one, and NEW can then be pruned; or prune the dense model."
            )

    @property
    def _widths(self) -> list[Width]:
        return [width for block in self.blocks for width in block.widths]

    def _first(self, width: Width) -> Width:
        return next(other for other in self._widths if other.kind == width.kind)

    def refusal(self, heads: int | None) -> str:
        """Why no stock class holds the model with so many groups of heads in each block; empty if one does.

        Args:
            heads: groups that stay; None: heads are not touched.
        """
        if heads not in self._known:
            self._known[heads] = self._ask(heads)
        return self._known[heads]

    def _ask(self, heads: int | None) -> str:
        try:
            shapes = self._shapes
            fits = list(shapes.fits)
            for block in self.blocks:
                prefix = f"{block.name}."
                # One neuron less, whatever will go: no class minds how many there are.
                left = {
                    width.name: heads if width.kind == "heads" and heads else max(1, width.groups - 1)
                    for width in block.widths
                }
                tensors = narrowed(block, shapes.fitter.shapes(block.index, fits[block.index].widths), left)
                biases = {f"{width.consumer.matrix.removeprefix(prefix)}.bias" for width in block.widths}
                tensors |= {
                    name: (tensors[f"{name.removesuffix('.bias')}.weight"][0],)
                    for name in biases if self.biases and name not in tensors
                }  # fmt: skip
                fits[block.index] = shapes.fitter(block.name, block.index, tensors, {})
            trial = replace(shapes, fits=fits)
            find_stock(trial, trial.common or {})
        except FormatError as reason:
            return str(reason)
        return ""


def narrowed(block: Block, dense: Mapping[str, Shape], left: Mapping[str, int]) -> dict[str, Shape]:
    """Shapes of a block's tensors, by their names in it, where so many groups of each width stay (all unless named)."""
    tensors = dict(dense)
    for width in block.widths:
        count = left.get(width.name, width.groups)
        if count == width.groups:
            continue
        keep = torch.arange(width.groups) < count
        for rows, members in ((True, width.rows), (False, width.columns)):
            for member in members:
                _cut(block, member, rows, int(member.kept(keep).sum()), tensors)
    return tensors


def _cut(block: Block, member: Member, rows: bool, length: int, tensors: dict[str, Shape]) -> None:
    slot = block.slot(member.matrix)
    name = slot.parameter.removeprefix(f"{block.name}.")
    shape = list(tensors[name])
    shape[0 if rows != slot.transposed else 1] = length
    tensors[name] = tuple(shape)
    bias = f"{name.rpartition('.')[0]}.bias"
    if rows and bias in tensors:
        tensors[bias] = (length,)
