"""Blocks whose typical score is low keep more: OWL without a threshold for outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.allocations.owl import Compat, by_importance
from prunus.allocations.ranking import kth_lowest
from prunus.errors import RecipeError, near
from prunus.sites import Matrix
from prunus.statistics import InputNorm, SiteStats


@dataclass(frozen=True)
class DLP:
    """s_b = s + mean(u) - u_b, u_b = 2·span·(max D - D_b) / (max D - min D) (Chen et al. 2025).

    D_b is the median of a block's Wanda scores |W_ij|·‖X_j‖₂, all matrices of the block together, on the dense model.
    The authors take a high median for a sign of unimportance, and write importance as 1 - D_b / Σ D, which their
    scaling by least and greatest turns into the same u. Unlike OWL it needs no threshold for outliers. From 60 % on.

    Attributes:
        span: the authors' α; the sparsest and the densest block differ by twice it, in [0, 0.5]; 0.15 as they use at
            70 %, 0.1 at 60 %.
        compat: `exact` shifts the sparsities so that the weighted mean is the target and each lies in [0, 0.99];
            `reference` takes the unweighted mean and only replaces what is not above 0 by 0.01.
    """

    span: float = 0.15
    compat: Compat = "exact"

    paper: ClassVar[str] = "Chen et al. 2025, arXiv:2505.23807"
    needs = frozenset[type]({InputNorm})
    foreseeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if span is outside [0, 0.5], or compat is unknown.
        """
        if not 0 <= self.span <= 0.5:
            raise RecipeError(f"allocation.span is {self.span:g}; it must be in [0, 0.5] (the authors use 0.15).")
        if self.compat not in get_args(Compat):
            raise RecipeError(f"allocation.compat is {self.compat!r}.{near(self.compat, get_args(Compat))}")

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity; all sites of a block share one.

        Raises:
            RecipeError: if the target is above 0.99.
        """
        medians = {block: float(median) for block, median in survey.measure(self.median, self.needs).items()}
        known = [value for value in medians.values() if not math.isnan(value)]
        mean = sum(known) / max(len(known), 1)
        importance = {block: -(mean if math.isnan(value) else value) for block, value in medians.items()}
        return by_importance(importance, survey.sites, sparsity, span=self.span, compat=self.compat)

    def median(self, matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """D_b, the lower of two middle scores, float64 scalar. Without any token NaN: the block counts as average.

        Matrices that saw no token have no scores and are left out.
        """
        norms = [(matrix.weight, stats[matrix.name][InputNorm]) for matrix in matrices]
        seen = [(weight, statistic.norm) for weight, statistic in norms if statistic.tokens]
        size = sum(weight.numel() for weight, _ in seen)
        if not size:
            return torch.tensor(math.nan, dtype=torch.float64)
        middle = kth_lowest(lambda: (weight.float().abs() * norm for weight, norm in seen), (size + 1) // 2)
        return torch.tensor(middle, dtype=torch.float64)
