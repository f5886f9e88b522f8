"""The mask stays as it was first chosen; the kept weights become the best ones for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.factor import Unit, UnitDiagonal, check_damp
from prunus.statistics import Gram, SiteStats
from prunus.updates.keep import zeroed
from prunus.updates.update import Choose


@dataclass(frozen=True)
class LeastSquares:
    """Minimises tr((W - Ŵ)·H·(W - Ŵ)ᵀ) over the kept weights: row by row ŵ_S = w_S + H_SS⁻¹·H_SP·w_P, H damped.

    The mask is asked for once, on the dense weights. No update of the kept weights alone loses less for this mask: a
    column sweep only makes up for a loss to its right, this on both sides. It is also the last step of ALPS (Meng et
    al. 2024, §3.3).

    Every row has its own support S, so H_SS would be factored once for each row. Instead one conjugate gradient runs
    for all rows together, preconditioned with the kept rows and columns of H⁻¹: two products `[out, in]·[in, in]` a
    step, and some ten steps. Since (H⁻¹)_SS is never less than (H_SS)⁻¹, it also bounds what is left to gain.

    Attributes:
        steps: of the conjugate gradient at most, at least 1.
        tolerance: a row is done when its loss exceeds the least possible one by at most this fraction, in (0, 1).
        damp: fraction of the mean diagonal of H added to the diagonal, in [0, 1]; 0.01 as in SparseGPT.
    """

    steps: int = 100
    tolerance: float = 0.01
    damp: float = 0.01

    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[type]] = frozenset({Gram})

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if steps < 1, the tolerance is outside (0, 1), or damp is outside [0, 1].
        """
        if self.steps < 1:
            raise RecipeError(f"update.steps is {self.steps}; it must be at least 1 (100 is the default).")
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"update.tolerance is {self.tolerance:g}; it must be in (0, 1) (0.01 is the default).")
        check_damp("update.damp", self.damp)

    def __call__(self, weight: Tensor, choose: Choose, stats: SiteStats) -> tuple[Tensor, Tensor]:
        """The refitted weight `[out, in]` in float32 or better, +0.0 where pruned, and the mask.

        Raises:
            CalibrationError: if inputs were NaN or infinite.
        """
        mask = choose(weight, slice(0, weight.shape[1])).contiguous()
        if stats.unseen:
            return zeroed(weight, mask), mask
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
        unit = stats.derive(UnitDiagonal(self.damp)).to(dense.dtype)
        change = refit(unit, zeroed(dense * unit.scale, ~mask).neg_(), mask, self)
        return zeroed(dense + change.div_(unit.scale), mask), mask


def refit(unit: Unit, change: Tensor, mask: Tensor, how: LeastSquares) -> Tensor:
    """Minimise tr(C·H·Cᵀ) over the entries of C in the mask, by conjugate gradients in all rows at once.

    Args:
        unit: H and its inverse, `[in, in]`.
        change: C to begin with, `[out, in]`; minus the lost weights where the mask is False, which stays so.
        mask: bool `[out, in]`, True = kept.
        how: its `steps` and `tolerance`.

    Returns:
        C, a fresh tensor. A row without gradient is not touched.
    """
    image = change @ unit.hessian
    loss, residual = _dot(change, image), zeroed(image, mask).neg_()
    least = torch.finfo(loss.dtype).eps * loss  # below it the running loss is rounding
    direction = zeroed(residual @ unit.inverse, mask)
    gain, change = _dot(residual, direction), change.clone()
    active = gain > how.tolerance * loss
    for _ in range(how.steps):
        if not bool(active.any()):
            break
        image = zeroed(direction @ unit.hessian, mask)
        curvature = _dot(direction, image)
        active &= curvature > 0  # rounding: nothing is left to gain in this direction
        length = torch.where(active, gain / curvature, 0.0)
        change.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        loss -= length * gain
        uphill = zeroed(residual @ unit.inverse, mask)
        left = _dot(residual, uphill)
        direction.mul_(torch.where(active, left / gain, 0.0)).add_(uphill)
        gain, active = left, active & (left > how.tolerance * torch.maximum(loss, least))
    return change


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Σ_j one_ij·other_ij, `[rows, 1]`."""
    return torch.linalg.vecdot(one, other)[:, None]
