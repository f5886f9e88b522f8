"""What can be made up for without training: kept weights, scales and biases in closed form, from sums over the inputs.

All minimise Σ w·‖t - Ŵ·x‖² over the inputs x that the pruned matrix sees, t being what it should give for them and Ŵ
zero where the mask is: `Refit` over every kept weight, `Rescaled` over one factor for each column and then each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prunus.factor import Unit
from prunus.updates.keep import zeroed
from prunus.updates.least_squares import LeastSquares, refit

# Added to the mean diagonal of H, as SparseGPT and ALPS do.
DAMP = 0.01


@dataclass(frozen=True, eq=False)
class Aims:
    """What one matrix sees and should give, summed over tokens with their weights w.

    Attributes:
        hessian: Σ w·x·xᵀ `[in, in]`.
        images: Σ w·t·xᵀ `[out, in]`.
        unit: of `hessian`, damped by `DAMP`.
    """

    hessian: Tensor
    images: Tensor
    unit: Unit


class Form(Protocol):
    """A closed form."""

    def __call__(self, pruned: Tensor, base: Tensor, mask: Tensor, aims: Aims) -> Tensor:
        """The new weight, float32 `[out, in]`, +0.0 where the mask is False.

        Args:
            pruned: Ŵ `[out, in]`.
            base: what it goes back to where the inputs say nothing, usually the dense weight W `[out, in]`.
            mask: bool `[out, in]`, True = kept.
            aims: in float32.
        """
        ...


@dataclass(frozen=True)
class Refit:
    """The kept weights that lose least for this mask: least squares in every row.

    Without a mask the best weight is W + (Σ w·t·xᵀ - W·H)·(H + λ)⁻¹, damped towards W; from there on it is the update
    `lsq` of pruning. With t = W·x it begins at W itself.
    """

    def __call__(self, pruned: Tensor, base: Tensor, mask: Tensor, aims: Aims) -> Tensor:
        """See `Form`; `pruned` is not used, since every kept weight is found anew."""
        unit, wanted = aims.unit, base.float()
        missing = aims.images - wanted @ aims.hessian
        wanted = wanted + (missing.div_(unit.scale) @ unit.inverse).div_(unit.scale)
        change = refit(unit, zeroed(wanted * unit.scale, ~mask).neg_(), mask, LeastSquares(damp=DAMP))
        return zeroed(wanted + change.div_(unit.scale), mask)


@dataclass(frozen=True)
class Rescaled:
    """One factor for each column, then one for each row: diag(r)·Ŵ·diag(c), both exact minima in their turn."""

    def __call__(self, pruned: Tensor, base: Tensor, mask: Tensor, aims: Aims) -> Tensor:
        """See `Form`; `base` is not used.

        With T = Σ w·t·xᵀ the columns solve (ŴᵀŴ ∘ H)·c = diag(Ŵᵀ·T), the row o then has (T_o·ŵ_o) / (ŵ_o·H·ŵ_o). An
        input that never fires, a column or a row without kept weights keeps the factor 1.
        """
        hessian, own, images = aims.hessian.double(), pruned.double(), aims.images.double()
        system = (own.T @ own) * hessian
        live = system.diagonal() > 0
        system.diagonal().add_(
            torch.where(live, 1e-6 * system.diagonal()[live].mean() if bool(live.any()) else 1.0, 1.0)
        )
        columns = torch.where(live, torch.linalg.solve(system, (own * images).sum(0)), 1.0)
        own = own * columns
        curvature = ((own @ hessian) * own).sum(1)
        rows = torch.where(curvature > 0, (images * own).sum(1) / curvature, 1.0)
        return zeroed((own * rows[:, None]).float().contiguous(), mask)
