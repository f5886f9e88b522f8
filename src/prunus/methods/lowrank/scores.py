"""What an error of a matrix is worth: the same everywhere, by the size of the inputs, or by what they really are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.statistics import Gram, InputNorm, SiteStats


class Worth(Protocol):
    """Gives M of the error tr((W - W')·M·(W - W')ᵀ). A frozen dataclass."""

    @property
    def needs(self) -> frozenset[type]:
        """Statistics that it reads."""
        ...

    def __call__(self, stats: SiteStats) -> Tensor | None:
        """M, `[in, in]`; None for the identity."""
        ...


@dataclass(frozen=True)
class Plain:
    """‖W - W'‖_F²: every weight counts the same (Eckart & Young 1936)."""

    needs = frozenset[type]()

    def __call__(self, stats: SiteStats) -> None:
        """No M."""
        return


@dataclass(frozen=True)
class Scaled:
    """‖(W - W')·S‖_F², S = diag(size of input ^ alpha) (Yuan et al. 2023, arXiv:2312.05821, §3.2).

    The size is the root mean square over tokens; the published code takes the mean of absolute values.

    Attributes:
        alpha: at least 0; 0.5 as in the paper. 0 is `Plain`.
    """

    alpha: float = 0.5

    needs = frozenset[type]({InputNorm})

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: alpha is below 0.
        """
        if not self.alpha >= 0:
            raise RecipeError(f"score.alpha is {self.alpha}; it must be at least 0.")

    def __call__(self, stats: SiteStats) -> Tensor | None:
        """S², diagonal; None without a token."""
        if stats.unseen:
            return None
        return torch.diag(stats[InputNorm].norm.double().pow(2 * self.alpha))


@dataclass(frozen=True)
class Whitened:
    """‖(W - W')·X‖_F²: the error of the outputs themselves (Wang et al. 2024, arXiv:2403.07378, §3.1).

    Attributes:
        damp: share of the mean diagonal of XXᵀ that is added to the diagonal, at least 0. 0 is the optimum on the
            calibration text; a little more trusts it less.
    """

    damp: float = 0.0

    needs = frozenset[type]({Gram})

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: damp is below 0.
        """
        if not self.damp >= 0:
            raise RecipeError(f"score.damp is {self.damp}; it must be at least 0.")

    def __call__(self, stats: SiteStats) -> Tensor | None:
        """XXᵀ, float32; None without a token."""
        if stats.unseen:
            return None
        moment = stats[Gram].hessian
        moment.diagonal().add_(self.damp * float(moment.diagonal().mean()))
        return moment
