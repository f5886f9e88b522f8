"""What can be made up for without training: kept weights, scales and biases in closed form, from sums over the inputs.

All minimise ‖(W - Ŵ)·x‖² over the inputs x that the pruned matrix sees, Ŵ being zero where the mask is: `refit` over
every kept weight, `rescaled` over one factor for each column and then each row, `shifted` over the bias alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.factor import UnitDiagonal
from prunus.statistics import Gram, InputMoments, SiteStats
from prunus.updates.keep import zeroed
from prunus.updates.least_squares import LeastSquares, refit

# Added to the mean diagonal of H, as SparseGPT and ALPS do.
DAMP = 0.01


@dataclass(frozen=True)
class Refit:
    """The kept weights that lose least for this mask: least squares in every row, begun with the dense weights."""

    needs = frozenset({Gram})

    def __call__(self, pruned: Tensor, dense: Tensor, mask: Tensor, stats: SiteStats) -> Tensor:
        """The new weight, float32 `[out, in]`, +0.0 where the mask is False.

        Args:
            pruned: Ŵ `[out, in]`; not used, since every kept weight is found anew.
            dense: W `[out, in]`.
            mask: bool `[out, in]`, True = kept.
            stats: of the inputs of the pruned matrix.
        """
        unit = stats.derive(UnitDiagonal(DAMP)).to(torch.float32)
        wanted = dense.float()
        change = refit(unit, zeroed(wanted * unit.scale, ~mask).neg_(), mask, LeastSquares(damp=DAMP))
        return zeroed(wanted + change.div_(unit.scale), mask)


@dataclass(frozen=True)
class Rescaled:
    """One factor for each column, then one for each row: diag(r)·Ŵ·diag(c), both exact minima in their turn."""

    needs = frozenset({Gram})

    def __call__(self, pruned: Tensor, dense: Tensor, mask: Tensor, stats: SiteStats) -> Tensor:
        """The new weight, as `Refit`.

        The columns solve (ŴᵀŴ ∘ H)·c = diag(Ŵᵀ·W·H), the row o then has (w_o·H·ŵ_o) / (ŵ_o·H·ŵ_o). An input that
        never fires, a column or a row without kept weights keeps the factor 1.
        """
        hessian, own, wanted = stats[Gram].hessian.double(), pruned.double(), dense.double()
        images = wanted @ hessian
        system = (own.T @ own) * hessian
        live = system.diagonal() > 0
        system.diagonal().add_(
            torch.where(live, 1e-6 * system.diagonal()[live].mean() if bool(live.any()) else 1.0, 1.0)
        )
        aims = (own * images).sum(0)
        columns = torch.where(live, torch.linalg.solve(system, aims), 1.0)
        own = own * columns
        curvature = ((own @ hessian) * own).sum(1)
        rows = torch.where(curvature > 0, (images * own).sum(1) / curvature, 1.0)
        return zeroed((own * rows[:, None]).float().contiguous(), mask)


def shifted(weight: Tensor, dense: Tensor, stats: SiteStats) -> Tensor:
    """What the bias must be raised by so that the mean output is the dense one: (W - Ŵ)·E[x], float32 `[out]`."""
    moments = stats[InputMoments]
    mean = moments.mean * (moments.samples / max(moments.tokens, 1))  # a sum over a sequence there
    return (dense.float() - weight.float()) @ mean
