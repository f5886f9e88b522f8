"""Support and weights are searched together, then the weights of the support are refitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.factor import UnitDiagonal, check_damp
from prunus.statistics import Gram, SiteStats
from prunus.updates.keep import zeroed
from prunus.updates.least_squares import LeastSquares, refit
from prunus.updates.update import Choose

Cut = Callable[[Tensor], Tensor]

_EVERY = 3  # steps between two looks at the support
_SOONEST = 30  # steps after which a support that still changes a little counts as settled
_SETTLED = 0.0003  # of the kept weights
_STIRS = 0.005  # change of the support below which the first rho is too high: it holds the first support fast
_LOWERINGS = 3  # divisions by 5 at most
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # more than this share has changed -> rho grows by this factor
_HIGHEST = 1e6  # of rho


@dataclass(frozen=True)
class ADMM:
    """Minimises tr((W - Ŵ)·H·(W - Ŵ)ᵀ) over mask and weights together (ALPS: Meng et al. 2024, arXiv:2406.07831).

    H is damped and rescaled to a unit diagonal; W·S goes with it. Algorithm 1 then takes turns: B is the weight that
    fits the outputs and stays near D, D is B plus the scaled dual V/ρ cut to the allowed support, V adds up how far
    they differ. ρ grows while the support still changes, so that B and D meet, and the search ends with the support.
    Algorithm 2 refits the weights on it, as `lsq` does.

    The cut is the metric's and the pattern's: `choose` is shown B + V/ρ in the units of the weight. With Wanda over the
    matrix it is the published one, the largest entries of the rescaled weights, because S_j² is ‖X_j‖² up to damping.

    The problem is not convex, and nothing is promised: on correlated inputs the result loses up to half as much as
    least squares on the first mask, on exactly uncorrelated ones up to 1 % more.

    Attributes:
        steps: of the search at most, at least 1; 300 as in the paper.
        rho: penalty to begin with, above 0; 0.1 as in the paper. Divided by 5 if it holds the first support fast.
        damp: fraction of the mean diagonal of H added to the diagonal, in [0, 1]; 0.01 as in the paper.
        tolerance: of the refit, as `lsq` has it: relative excess loss at which a row is done, in (0, 1).
    """

    steps: int = 300
    rho: float = 0.1
    damp: float = 0.01
    tolerance: float = 1e-4

    paper: ClassVar[str] = "Meng et al. 2024, arXiv:2406.07831"
    needs: ClassVar[frozenset[type]] = frozenset({Gram})

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if steps < 1, rho is not positive, or damp is outside [0, 1].
        """
        if self.steps < 1:
            raise RecipeError(f"update.steps is {self.steps}; it must be at least 1 (the paper uses 300).")
        if not 0 < self.rho < float("inf"):
            raise RecipeError(f"update.rho is {self.rho:g}; it must be above 0 (the paper begins with 0.1).")
        check_damp("update.damp", self.damp)
        LeastSquares(tolerance=self.tolerance)  # checks it

    def __call__(self, weight: Tensor, choose: Choose, stats: SiteStats) -> tuple[Tensor, Tensor]:
        """The refitted weight `[out, in]` in float32 or better, +0.0 where pruned, and the mask.

        Raises:
            CalibrationError: if inputs were NaN or infinite.
            RecipeError: if the Hessian is not positive definite; raise damp.
        """
        mask = choose(weight, slice(0, weight.shape[1])).contiguous()
        if stats.unseen or bool(mask.all()):
            return zeroed(weight, mask), mask
        given = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
        unit = stats.derive(UnitDiagonal(self.damp)).to(given.dtype)
        dense = given * unit.scale

        def cut(values: Tensor) -> Tensor:
            return choose(values / unit.scale, slice(0, values.shape[1])).contiguous()

        found = self._search(dense, unit.hessian, cut, mask, stats.site)
        mask = cut(found)
        # A row that is kept whole needs no change; the search leaves rounding there.
        start = zeroed(found, mask).sub_(dense).mul_(~mask.all(1, keepdim=True))
        change = refit(unit, start, mask, LeastSquares(tolerance=self.tolerance))
        return zeroed(given + change.div_(unit.scale), mask), mask

    def _search(self, dense: Tensor, hessian: Tensor, cut: Cut, first: Tensor, site: str) -> Tensor:
        """Algorithm 1 on the rescaled weights, begun with the mask `first`: the last B `[out, in]`."""
        products, rho, moving, lowered = dense @ hessian, self.rho, False, 0
        kept, dual, mask, before = zeroed(dense, first), torch.zeros_like(dense), first, first
        fitted = dense
        for step in range(_EVERY, self.steps + _EVERY, _EVERY):
            inverse = _inverse(hessian, rho, site)
            for _ in range(_EVERY):
                fitted = (products + rho * kept - dual) @ inverse
                shifted = fitted + dual / rho
                mask = cut(shifted)
                kept = zeroed(shifted, mask)
                dual = (shifted - kept).mul_(rho)
            changed = int((mask != before).count_nonzero()) / max(int(mask.count_nonzero()), 1)
            moving |= changed > _STIRS or lowered == _LOWERINGS
            if not moving:
                rho, lowered = rho / 5, lowered + 1
                kept, dual, mask = zeroed(dense, first), torch.zeros_like(dense), first
            elif changed == 0 or (step > _SOONEST and changed < _SETTLED):
                break
            else:
                rho = min(rho * next(factor for share, factor in _GROWTH if changed > share), _HIGHEST)
            before = mask
        return fitted


def _inverse(hessian: Tensor, rho: float, site: str) -> Tensor:
    """(H + ρ·I)⁻¹ `[in, in]`."""
    raised = hessian.clone()
    raised.diagonal().add_(rho)
    lower, failed = torch.linalg.cholesky_ex(raised)
    if failed or not bool(lower.diagonal().isfinite().all()):
        raise RecipeError(
            f"{site}: the Hessian is not positive definite at rho {rho:g}. Ask for more damping, such as"
            " --set update.damp=0.01, or use more calibration samples."
        )
    return torch.cholesky_inverse(lower)
