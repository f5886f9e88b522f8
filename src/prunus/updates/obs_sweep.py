"""One sweep over the columns: each loss is made up for by the columns to its right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunus.errors import RecipeError, near
from prunus.factor import Factor, check_damp
from prunus.statistics import Gram, SiteStats
from prunus.updates.grid import Grid, row_grid
from prunus.updates.keep import zeroed
from prunus.updates.update import Choose

Compat = Literal["exact", "reference"]

_PANEL = 32  # columns corrected one by one; then one product corrects the rest of the block


@dataclass(frozen=True)
class OBSSweep:
    """SparseGPT's column sweep (Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1), looking left.

    With UᵀU = (H + damping)⁻¹, column j goes with error e_j = w_j / U_jj in the pruned rows and every column i to its
    right becomes w_i - e_j·U_ji. Here a column collects all its corrections when its turn comes, and columns are asked
    for, and fixed, a block at a time. The inverse is never formed: with H = R·Rᵀ the corrections of block b by all
    earlier ones are Σ_a (W_a - Ŵ_a)·R_ab·R_bb⁻¹, because (W - Ŵ)·R = E.

    A pruned weight is made up for only by those to its right, so this is not the least-squares optimum of its mask.

    Attributes:
        block: columns per mask decision, at least 1; 128 as in the paper. Rounded to whole groups of an N:M pattern.
            A fixed mask gives the same weights for every block size.
        damp: fraction of the mean diagonal of H added to the diagonal, in [0, 1]; 0.01 as in SparseGPT.
        compat: `reference` zeroes every input that never fires, even beyond the wanted sparsity. `exact` keeps the
            count: their weights go first (the OBS metric scores them 0), and what exceeds the quota stays, without
            effect on the output.
        bits: 0 leaves kept weights free; 2 to 8 also rounds each, when its turn comes, to one of 2^bits evenly spaced
            values of its row, and makes up for the rounding as for a loss. They are stored in the dtype of the model,
            which may round them once more. Without sparsity this is GPTQ in the given order of columns.
    """

    block: int = 128
    damp: float = 0.01
    compat: Compat = "exact"
    bits: int = 0

    paper: ClassVar[str] = "Frantar & Alistarh 2023, arXiv:2301.00774"
    needs: ClassVar[frozenset[type]] = frozenset({Gram})

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if block < 1, damp is outside [0, 1], bits are not 0 or 2 to 8, or compat is unknown.
        """
        if self.block < 1:
            raise RecipeError(f"update.block is {self.block}; it must be at least 1 column (the paper uses 128).")
        check_damp("update.damp", self.damp)
        if self.compat not in get_args(Compat):
            raise RecipeError(f"update.compat is {self.compat!r}.{near(self.compat, get_args(Compat))}")
        if self.bits not in (0, *range(2, 9)):
            raise RecipeError(f"update.bits is {self.bits}; it must be 0 (off) or from 2 to 8 (the paper uses 4).")

    def __call__(self, weight: Tensor, choose: Choose, stats: SiteStats) -> tuple[Tensor, Tensor]:
        """The updated weight `[out, in]` in float32 or better, +0.0 where pruned, and the mask.

        Raises:
            CalibrationError: if inputs were NaN or infinite.
            RecipeError: if the Hessian cannot be factored; raise damp.
        """
        factored = stats.derive(Factor(self.damp))
        # Columns as rows: every step below then reads and writes contiguous memory.
        dense = torch.empty(
            weight.T.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        ).copy_(weight.T)
        grid = row_grid(dense.T, self.bits) if self.bits else None
        dead = factored.dead if self.compat == "reference" and not stats.unseen else None
        if dead is not None:
            dense[dead] = 0.0
        swept, mask = self._sweep(dense, choose, factored.upper.to(dense.dtype), grid)
        if dead is not None:
            mask[dead] = False
        return swept.T, mask.T

    def _sweep(self, dense: Tensor, choose: Choose, upper: Tensor, grid: Grid | None) -> tuple[Tensor, Tensor]:
        """The swept weight and the mask, both `[in, out]`; overwrites `dense` with what was lost, W - Ŵ."""
        swept, mask = torch.empty_like(dense), torch.empty_like(dense, dtype=torch.bool)
        width = max(self.block - self.block % choose.align, choose.align)
        for start in range(0, len(dense), width):
            columns = slice(start, min(start + width, len(dense)))
            inverse = _inverse(upper[columns, columns])
            gathered = upper[:start, columns].T @ dense[:start]
            present = torch.addmm(dense[columns], inverse.T, gathered)
            errors, mask[columns] = _sweep_block(present, inverse, choose, columns, grid)
            present.addmm_(inverse.T, errors, alpha=-1)
            swept[columns] = zeroed(grid(present) if grid else present, mask[columns])
            dense[columns] -= swept[columns]
        return swept, mask


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular `[n, n]`."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _sweep_block(
    present: Tensor, inverse: Tensor, choose: Choose, columns: slice, grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """Decide about one block of columns, given their values `present [cols, out]` and its U, `inverse [cols, cols]`.

    Returns:
        The errors e_j = (w_j - ŵ_j) / U_jj and the mask, both `[cols, out]`.
    """
    errors = torch.empty_like(present)
    grouped = choose.grouped  # the groups of N:M see what the groups before them left
    step = choose.align if grouped else _PANEL
    mask = torch.empty_like(present, dtype=torch.bool) if grouped else choose(present.T, columns).T
    for start in range(0, len(present), step):
        part = slice(start, min(start + step, len(present)))
        now = torch.addmm(present[part], inverse[:start, part].T, errors[:start], alpha=-1)
        if grouped:
            mask[part] = choose(now.T, slice(columns.start + part.start, columns.start + part.stop)).T
        _fix(now, mask[part], inverse[part, part], errors[part], grid)
    return errors, mask


def _fix(present: Tensor, mask: Tensor, inverse: Tensor, errors: Tensor, grid: Grid | None) -> None:
    """Write the errors of a few columns, one after the other, into `errors [cols, out]`."""
    # A kept weight has no error, unless it is rounded.
    wrong = torch.ones_like(mask) if grid else ~mask
    scale = wrong.to(present.dtype).mul_((1 / inverse.diagonal())[:, None])
    corrections = inverse.T.contiguous()
    steps = zip(present.unbind(), scale.unbind(), corrections.unbind(), errors.unbind(), mask.unbind(), strict=True)
    for i, (value, factor, correction, error, kept) in enumerate(steps):
        torch.addmv(value, errors[:i].T, correction[:i], alpha=-1, out=error)
        if grid:
            error.sub_(zeroed(grid(error), kept))
        error.mul_(factor)
