"""The loss of removing a weight when the weights to its right may make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.factor import Factor, check_damp
from prunus.metrics.magnitude import magnitude
from prunus.metrics.metric import Scorer
from prunus.statistics import Gram, SiteStats


@dataclass(frozen=True)
class OBS:
    """W_ij² / U_jj², UᵀU = (H + damp·mean(diag H)·I)⁻¹ (Frantar & Alistarh 2023, eq. 3 and the Cholesky form of §3.3).

    U_jj² is the first diagonal entry of the inverse of H without the columns left of j, which are fixed by the time j
    is decided. Inputs that never fire score 0, so that their weights go first.

    Attributes:
        damp: fraction of the mean diagonal of H added to the diagonal, in [0, 1]; 0.01 as in SparseGPT. Set together
            with the update's own.
    """

    damp: float = 0.01

    paper: ClassVar[str] = "Frantar & Alistarh 2023, arXiv:2301.00774"
    needs = frozenset[type]({Gram})

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: if damp is outside [0, 1].
        """
        check_damp("metric.damp", self.damp)

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]` in units of squared output, float32. Without a token: |W|."""
        if stats.unseen:
            return magnitude
        factored = stats.derive(Factor(self.damp))
        # U_jj = 1 / R_jj.
        scale = factored.upper.diagonal().masked_fill(factored.dead, 0.0)

        def score(weight: Tensor, columns: slice) -> Tensor:
            return magnitude(weight, columns).mul_(scale[columns]).square_()

        return score
