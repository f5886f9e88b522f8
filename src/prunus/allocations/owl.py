"""Blocks with many outliers keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.allocations.project import project
from prunus.errors import RecipeError, near
from prunus.sites import Matrix, SiteInfo, block_sizes
from prunus.statistics import InputNorm, SiteStats

Compat = Literal["exact", "reference"]


@dataclass(frozen=True)
class OWL:
    """s_b = s + mean(u) - u_b, u_b = 2·span·(D_b - min D) / (max D - min D) (Yin et al. 2023, §3.2).

    D_b is the share of a block's Wanda scores |W_ij|·‖X_j‖₂ above `multiple` times their mean, all matrices of the
    block together, on the dense model. Helps from 60 % on; at 50 % it changes little.

    Attributes:
        multiple: M, how many times the mean makes an outlier, above 0; 5 as the authors use for LLaMA.
        span: λ; the sparsest and the densest block differ by 2λ, in [0, 0.5]; 0.08 as the authors use.
        compat: `exact` shifts the sparsities so that the weighted mean is the target and each lies in [0, 0.99];
            `reference` takes the unweighted mean and only replaces what is not above 0 by 0.01.
    """

    multiple: float = 5.0
    span: float = 0.08
    compat: Compat = "exact"

    paper: ClassVar[str] = "Yin et al. 2023, arXiv:2310.05175"
    needs = frozenset[type]({InputNorm})
    foreseeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if multiple <= 0, span is outside [0, 0.5], or compat is unknown.
        """
        if not self.multiple > 0:
            raise RecipeError(f"allocation.multiple is {self.multiple:g}; it must be above 0 (the authors use 5).")
        if not 0 <= self.span <= 0.5:
            raise RecipeError(f"allocation.span is {self.span:g}; it must be in [0, 0.5] (the authors use 0.08).")
        if self.compat not in get_args(Compat):
            raise RecipeError(f"allocation.compat is {self.compat!r}.{near(self.compat, get_args(Compat))}")

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity; all sites of a block share one.

        Raises:
            RecipeError: if the target is above 0.99.
        """
        found = survey.measure(self.outliers, self.needs)
        importance = {block: float(ratio) for block, ratio in found.items()}
        return by_importance(importance, survey.sites, sparsity, span=self.span, compat=self.compat)

    def outliers(self, matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """D_b as a fraction, float64 scalar. Matrices that saw no token have no scores and are left out."""
        norms = [(matrix.weight, stats[matrix.name][InputNorm]) for matrix in matrices]
        seen = [(weight, statistic.norm) for weight, statistic in norms if statistic.tokens]
        size = sum(weight.numel() for weight, _ in seen)
        if not size:
            return torch.zeros((), dtype=torch.float64)
        # Σ_ij |W_ij|·n_j needs no matrix of scores.
        total = sum(float(weight.float().abs().sum(0).double() @ norm.double()) for weight, norm in seen)
        threshold = self.multiple * total / size
        above = sum(int((weight.float().abs() * norm > threshold).sum()) for weight, norm in seen)
        return torch.tensor(above / size, dtype=torch.float64)


def by_importance(
    importance: Mapping[str, float], sites: Sequence[SiteInfo], sparsity: float, *, span: float, compat: Compat
) -> dict[str, float]:
    """s_b = s + mean(u) - u_b with u_b from 0 for the least important block to 2·span for the most, by site.

    The same for all if all are equally important.

    Args:
        importance: block -> any real number.
        sites: all sites; those of a block share one sparsity.
        sparsity: of all blocks together.
        span: half of what the sparsest and the densest block differ by.
        compat: `exact` meets the target within [0, 0.99]; `reference` as published, see `OWL`.

    Raises:
        RecipeError: if `exact` and the target is above 0.99.
    """
    low, high = min(importance.values(), default=0.0), max(importance.values(), default=0.0)
    spread = high - low or 1.0
    kept = {block: (value - low) / spread * 2 * span for block, value in importance.items()}
    mean = sum(kept.values()) / max(len(kept), 1)
    raw = {block: sparsity + mean - value for block, value in kept.items()}
    if compat == "exact":
        blocks = project(raw, block_sizes(sites), sparsity)
    else:
        blocks = {block: value if value > 0 else 0.01 for block, value in raw.items()}
    return {site.name: blocks[site.block] for site in sites}
