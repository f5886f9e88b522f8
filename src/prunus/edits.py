"""Decisions as values: what a method wants done to one site, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus.sites import Block, Member, Slot, Width


@dataclass(frozen=True)
class Sparse:
    """A matrix becomes these numbers; the zeros of the mask are exact.

    Attributes:
        name: the site.
        weight: `[out, in]`, +0.0 wherever `mask` is False.
        mask: bool `[out, in]`, True = kept.
        order: int64 `[in]`, the order of columns in which the mask obeys its pattern; None: as they are.
    """

    name: str
    weight: Tensor
    mask: Tensor
    order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Narrow:
    """A width keeps some of its groups; the matrices around it shrink.

    Attributes:
        name: the width.
        keep: bool `[groups]`, True = kept.
        weights: consumer → its new values `[out, in]` at full width, read only at the kept columns; others stay as
            they are.
        biases: consumer → what is added to its outputs `[out]`; a bias is made where there was none.
    """

    name: str
    keep: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Split:
    """A matrix becomes the product of two.

    Attributes:
        name: the site.
        outer: B `[out, rank]`.
        inner: A `[rank, in]`; B·A stands for the matrix.
    """

    name: str
    outer: Tensor
    inner: Tensor

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        return self.inner.shape[0]


def apply(block: Block, edit: Sparse, stored: Callable[[str], torch.dtype]) -> None:
    """Write a sparse matrix into a loaded block, rounded to the dtype that the checkpoint stores.

    Rounding here, not only on disk, lets the next block see exactly what a reader of the checkpoint will see; a
    resumed run therefore continues from the same numbers.

    Args:
        block: changed in place.
        edit: the decision for one of its matrices.
        stored: parameter → its dtype on disk.
    """
    slot = block.slot(edit.name)
    slot.matrix().weight.copy_(edit.weight.to(stored(slot.parameter)))


def revalue(block: Block, edit: Narrow, stored: Callable[[str], torch.dtype]) -> None:
    """The part of a `Narrow` that changes numbers but no shape: new weights of consumers, and their biases."""
    for name, weight in edit.weights.items():
        slot = block.slot(name)
        slot.matrix().weight.copy_(weight.to(stored(slot.parameter)))
    for name, addition in edit.biases.items():
        slot = block.slot(name)
        weight = getattr(slot.module, slot.attribute)
        rounding = stored(slot.parameter)
        before = bias_of(slot)
        total = addition.to(weight.device, torch.float32) + (0 if before is None else before.float())
        slot.module.bias = nn.Parameter(total.to(rounding).to(weight.dtype), requires_grad=False)


def narrow(block: Block, width: Width, keep: Tensor) -> None:
    """Cut the rows and columns of the groups that go; on the meta device only the shapes change."""
    for member in width.rows:
        _cut(block, member, keep, rows=True)
    for member in width.columns:
        _cut(block, member, keep, rows=False)


def blank(block: Block, width: Width, keep: Tensor) -> None:
    """Zero the columns of the groups that go, which computes what `narrow` does at the full shape."""
    for member in width.columns:
        weight = block.slot(member.matrix).matrix().weight
        weight[:, ~member.kept(keep).to(weight.device)] = 0.0


def bias_of(slot: Slot) -> Tensor | None:
    """The bias `[out]` of a matrix, or None."""
    return getattr(slot.module, "bias", None)


def _cut(block: Block, member: Member, keep: Tensor, *, rows: bool) -> None:
    slot = block.slot(member.matrix)
    module, parameter = slot.module, getattr(slot.module, slot.attribute)
    kept = member.kept(keep)
    index = kept.nonzero().flatten().to(parameter.device)
    axis = 0 if rows != slot.transposed else 1
    setattr(module, slot.attribute, _smaller(parameter, axis, index))
    bias = bias_of(slot)
    if rows and bias is not None:
        module.bias = _smaller(bias, 0, index)
    out, columns = slot.info.shape
    shape = (len(index), columns) if rows else (out, len(index))
    for attribute in ("out_features", "nf") if rows else ("in_features", "nx"):
        if hasattr(module, attribute):
            setattr(module, attribute, len(index))
    block.resize(member.matrix, shape)


def _smaller(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    if parameter.device.type == "meta":
        shape = [len(index) if place == axis else size for place, size in enumerate(parameter.shape)]
        return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
    return nn.Parameter(parameter.detach().index_select(axis, index).contiguous(), requires_grad=False)
