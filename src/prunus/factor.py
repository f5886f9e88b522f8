"""The damped Hessian, computed once per shared input: factored for the OBS sweep, or rescaled for iterative solvers."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import CalibrationError, RecipeError
from prunus.statistics import Gram, SiteStats

_LOG = logging.getLogger("prunus")
_RAISES = (1, 10, 100, 1000)  # the wanted damping, then three tries with ten times more


def check_damp(setting: str, damp: float) -> None:
    """Refuse a damping that is no share of the mean diagonal.

    Args:
        setting: how the user wrote it, such as `update.damp`.
        damp: its value.

    Raises:
        RecipeError: it is outside [0, 1].
    """
    if not 0 <= damp <= 1:
        raise RecipeError(f"{setting} is {damp:g}; it must be in [0, 1] (SparseGPT and ALPS use 0.01).")


@dataclass(frozen=True, eq=False)
class Factored:
    """A damped Hessian, factored.

    Attributes:
        upper: R `[in, in]`, upper triangular, R·Rᵀ = H + damping·I. The U of SparseGPT (UᵀU = H⁻¹) is R⁻¹, so that
            U_jj = 1 / R_jj and a diagonal block of U is the inverse of that block of R.
        dead: bool `[in]`, inputs that were zero on every token.
        damp: fraction of the mean diagonal that was added in the end.
    """

    upper: Tensor
    dead: Tensor
    damp: float


@dataclass(frozen=True)
class Factor:
    """Reads `Gram`, gives `Factored`; pass it to `SiteStats.derive`, which computes it once per shared input.

    SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774, §3) inverts H and factors the inverse. One factorisation is
    enough: if P reverses the order of the inputs and P·H·P = L·Lᵀ, then R = P·L·P is upper triangular and H = R·Rᵀ.

    Attributes:
        damp: added to the diagonal, as a fraction of its mean, in [0, 1].
    """

    damp: float

    def __call__(self, stats: SiteStats) -> Factored:
        """Factor the Hessian of this input.

        Raises:
            CalibrationError: if inputs were NaN or infinite.
            RecipeError: if H stays indefinite at a thousand times the damping, in float64 too; raise the damping.
        """
        reversed_hessian = _finite(stats).flip(0, 1)
        diagonal = reversed_hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1.0  # any positive number: nothing is lost with an input that never fires
        lower, damp = self._cholesky(reversed_hessian, stats.site)
        return Factored(lower.flip(0, 1), dead.flip(0), damp)

    def _cholesky(self, hessian: Tensor, site: str) -> tuple[Tensor, float]:
        """The lower factor and the damping that made it possible; says so when that is not the wanted one."""
        given = hessian.diagonal().double()
        for dtype in (hessian.dtype, torch.float64):
            damped = hessian.to(dtype)
            for raised in _RAISES:
                damp = self.damp * raised
                damped.diagonal().copy_(given + damp * given.mean())
                lower, failed = torch.linalg.cholesky_ex(damped)
                if not failed and bool(lower.diagonal().isfinite().all()):
                    if raised > 1 or dtype != hessian.dtype:
                        _LOG.warning("%s: Hessian factored with damp %g in %s, not %g.", site, damp, dtype, self.damp)
                    return lower.to(hessian.dtype), damp
        raise RecipeError(
            f"{site}: the Hessian is not positive definite, even with damp {self.damp * _RAISES[-1]:g} in float64."
            f" Ask for more with --set update.damp={max(10 * self.damp, 0.01):g}, or use more calibration samples."
        )


@dataclass(frozen=True, eq=False)
class Unit:
    """A damped Hessian, rescaled to ones on its diagonal: S⁻¹·(H + damping·I)·S⁻¹.

    Attributes:
        hessian: `[in, in]`, symmetric, unit diagonal; its spectrum does not depend on the sizes of the inputs.
        inverse: of `hessian`, `[in, in]`, positive definite; a little damped where there is no other.
        scale: diagonal of S, `[in]`, positive; the weights that go with it are W·S.
    """

    hessian: Tensor
    inverse: Tensor
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Unit:
        """The same in another dtype."""
        return Unit(self.hessian.to(dtype), self.inverse.to(dtype), self.scale.to(dtype))


@dataclass(frozen=True)
class UnitDiagonal:
    """Reads `Gram`, gives `Unit`; pass it to `SiteStats.derive`, which computes it once per shared input.

    Inputs that never fire have no say in the damping and end up alone, with a one on the diagonal.

    Attributes:
        damp: added to the diagonal, as a fraction of its mean, in [0, 1].
    """

    damp: float

    def __call__(self, stats: SiteStats) -> Unit:
        """Damp and rescale the Hessian of this input.

        Raises:
            CalibrationError: if inputs were NaN or infinite.
        """
        return unit_diagonal(_finite(stats), self.damp)


def unit_diagonal(hessian: Tensor, damp: float) -> Unit:
    """Damp and rescale a Hessian, in place.

    Args:
        hessian: `[in, in]`, symmetric; nobody else's.
        damp: as in `UnitDiagonal`.
    """
    diagonal = hessian.diagonal()
    live = diagonal > 0
    given = diagonal.double()
    damping = damp * given[live].mean() if bool(live.any()) else 0.0
    scale = torch.where(live, given + damping, 1.0).sqrt().to(hessian.dtype)
    hessian.div_(scale).div_(scale[:, None])
    diagonal.fill_(1.0)
    return Unit(hessian, _inverse(hessian), scale)


def _inverse(hessian: Tensor) -> Tensor:
    """The inverse of a matrix with unit diagonal, damped as little as makes it more than rounding."""
    rounding = len(hessian) * torch.finfo(hessian.dtype).eps
    for damping in (0.0, rounding, 1e-3, 1e-2, 1e-1):
        damped = hessian.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.diagonal().square().min() > rounding / 10):
            return torch.cholesky_inverse(lower)
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def _finite(stats: SiteStats) -> Tensor:
    """The Hessian, a fresh tensor; raises CalibrationError if it is none."""
    gram = stats[Gram]
    if not gram.finite():
        raise CalibrationError(
            f"{stats.site}: its calibration inputs hold NaN or infinity, so there is no Hessian."
            " Calibrate in float32, or look for a damaged weight in an earlier block."
        )
    return gram.hessian
