"""Weight times the size of its input and of its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from prunus.errors import RecipeError, near
from prunus.gradients import LossGradientL1, LossGradientL1Published, LossGradientL2, WeightGradient
from prunus.metrics.magnitude import magnitude
from prunus.metrics.metric import Scorer
from prunus.statistics import InputNorm, SiteStats

Norm = Literal["l1", "l2"]
Compat = Literal["exact", "reference"]

# What the published code multiplies gradients by, and the number of samples that its results were made with.
SCALE, SAMPLES = 100.0, 128


@dataclass(frozen=True)
class GBLM:
    """|W_ij|·(‖X_j‖₂ + alpha·G_ij) (Das et al. 2023, arXiv:2311.04902), G over samples on the dense model.

    G is the mean of |∂L/∂W_ij| over samples (`l1`) or its root mean square (`l2`), L the loss of one sample. The
    published code sums instead, so that its balance between inputs and gradients moves with the number of samples;
    here it stays, at what 128 samples make of it there.

    Attributes:
        norm: `l1`, the authors' best, or `l2`.
        alpha: weight of the gradient, at least 0; by default 100·128 for l1 and 100·√128 for l2, which equals the
            published results. 0 is Wanda.
        compat: `reference` sums over samples as the published code does: alpha is multiplied by their number (l1) or
            its root (l2) and is 100 by default.
    """

    norm: Norm = "l1"
    alpha: float | None = None
    compat: Compat = "exact"

    paper: ClassVar[str] = "Das et al. 2023, arXiv:2311.04902"

    def __post_init__(self) -> None:
        """Check the names and the range.

        Raises:
            RecipeError: for an unknown norm or compat, or a negative or infinite alpha.
        """
        for field, value, known in (("norm", self.norm, Norm), ("compat", self.compat, Compat)):
            if value not in get_args(known):
                raise RecipeError(f"metric.{field} is {value!r}.{near(str(value), get_args(known))}")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise RecipeError(f"metric.alpha is {self.alpha:g}; it must be at least 0 (0 is Wanda).")

    @property
    def needs(self) -> frozenset[type]:
        """Input norms, and the kind of gradient that `norm` names."""
        return frozenset({InputNorm, self.kind})

    @property
    def kind(self) -> type[WeightGradient]:
        """The gradient that `norm` names."""
        if self.norm == "l2":
            return LossGradientL2
        return LossGradientL1 if self.compat == "exact" else LossGradientL1Published

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]`, float32. Without a token: |W|."""
        if stats.unseen:
            return magnitude
        gradient = stats[self.kind]
        scale = stats[InputNorm].norm + self._alpha(gradient.samples) * gradient.mean

        def score(weight: Tensor, columns: slice) -> Tensor:
            return magnitude(weight, columns).mul_(scale[:, columns])

        return score

    def _alpha(self, samples: int) -> float:
        """The factor of the mean."""
        power = 1 if self.norm == "l1" else 0.5
        if self.compat == "reference":
            return (SCALE if self.alpha is None else self.alpha) * samples**power
        return SCALE * SAMPLES**power if self.alpha is None else self.alpha
