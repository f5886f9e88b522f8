"""A few evenly spaced values for each output: what quantised weights may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """step·(k - zero) for k = 0 … top: asymmetric, from the least to the largest weight of a row, 0 always among them.

    Attributes:
        step: distance of two values `[out]`, positive.
        zero: the k whose value is 0, `[out]`, a whole number in [0, top].
        top: the largest k.
    """

    step: Tensor
    zero: Tensor
    top: int

    def __call__(self, values: Tensor) -> Tensor:
        """The nearest value of the grid for each of `[…, out]`, a fresh tensor; halves go to even k."""
        return values.div(self.step).round_().add_(self.zero).clamp_(0, self.top).sub_(self.zero).mul_(self.step)


def row_grid(weight: Tensor, bits: int) -> Grid:
    """The grid of 2^bits values for each row of a dense `[out, in]`, without a search for a better range.

    Args:
        weight: float32 or better.
        bits: at least 1.
    """
    top = 2**bits - 1
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    step = (high - low) / top
    step = torch.where(step > 0, step, 1.0)  # a row of zeros
    return Grid(step, (-low / step).round_(), top)
