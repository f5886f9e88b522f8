"""Weight relative to its row and its column, times the size of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.metrics.magnitude import magnitude
from prunus.metrics.metric import Scorer
from prunus.statistics import InputNorm, SiteStats


@dataclass(frozen=True)
class RIA:
    """(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|)·‖X_j‖₂^power (Zhang et al. 2024, eq. 4).

    The sums are those of the dense matrix, also after an update has corrected some columns. Spreads the losses over
    rows and columns, so that no channel is emptied; worth trying from 50 % on. The published code ranks over the whole
    matrix unless told otherwise (`--set pattern.group=matrix`).

    Attributes:
        power: of the input norm, at least 0; 0.5 as in the paper, 0 leaves the data out.
    """

    power: float = 0.5

    paper: ClassVar[str] = "Zhang et al. 2024, ICLR, openreview Tr0lPx9woF"
    needs = frozenset[type]({InputNorm})

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: if the power is negative.
        """
        if not 0 <= self.power < float("inf"):
            raise RecipeError(f"metric.power is {self.power:g}; it must be at least 0 (the paper uses 0.5).")

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]`, float32. Without a token: |W|."""
        if stats.unseen:
            return magnitude
        size = magnitude(weight, slice(None))
        per_input, per_output = _inverse(size.sum(0)), _inverse(size.sum(1, keepdim=True))
        norm = stats[InputNorm].norm.pow(self.power)

        def score(weight: Tensor, columns: slice) -> Tensor:
            return magnitude(weight, columns) * (per_input[columns] + per_output) * norm[columns]

        return score


def _inverse(total: Tensor) -> Tensor:
    """1 / total, and 0 where a row or column is empty: its weights, all zero, then score 0 and not 0/0."""
    return torch.where(total > 0, 1 / total, 0.0)
