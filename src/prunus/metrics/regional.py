"""Weight times the size of its input and of the gradient of its block's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.errors import RecipeError
from prunus.gradients import RegionalGradient
from prunus.metrics.magnitude import magnitude
from prunus.metrics.metric import Scorer
from prunus.statistics import InputNorm, SiteStats


@dataclass(frozen=True)
class Regional:
    """|W_ij|·(‖X_j‖₂ + alpha·G_ij) (Wanda++, Yang et al. 2025, arXiv:2503.04992).

    G is the root mean square over samples of ∂‖block(X)‖₂/∂W_ij: a gradient that one block alone gives, so that no
    backward pass through the model is needed.

    Attributes:
        alpha: weight of the gradient, at least 0; 100 as the authors use. 0 is Wanda.
    """

    alpha: float = 100.0

    paper: ClassVar[str] = "Yang et al. 2025, arXiv:2503.04992"
    needs = frozenset[type]({InputNorm, RegionalGradient})

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: if alpha is negative or infinite.
        """
        if not 0 <= self.alpha < math.inf:
            raise RecipeError(f"metric.alpha is {self.alpha:g}; it must be at least 0 (the authors use 100).")

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]`, float32. Without a token: |W|."""
        if stats.unseen:
            return magnitude
        scale = stats[InputNorm].norm + self.alpha * stats[RegionalGradient].mean

        def score(weight: Tensor, columns: slice) -> Tensor:
            return magnitude(weight, columns).mul_(scale[:, columns])

        return score
