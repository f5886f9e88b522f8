"""Decisions as values: what a method wants done to one site, and doing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.sites import Matrix


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


def apply(matrix: Matrix, edit: Sparse, stored: torch.dtype) -> None:
    """Write the edit into the matrix, rounded to the dtype that the checkpoint stores.

    Rounding here, not only on disk, lets the next block see exactly what a reader of the checkpoint will see; a
    resumed run therefore continues from the same numbers.

    Args:
        matrix: the view to write into, `[out, in]`.
        edit: the decision for the same site.
        stored: dtype of this tensor on disk.
    """
    assert edit.name == matrix.name, (edit.name, matrix.name)
    matrix.weight.copy_(edit.weight.to(stored))
