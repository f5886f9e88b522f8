"""What a group is worth to the loss, by its gradients (LLM-Pruner, Ma et al. 2023, arXiv:2305.11627, §3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.gradients import LossGradientL2, LossGradientSum
from prunus.sites import Matrix, Width
from prunus.statistics import SiteStats


@dataclass(frozen=True)
class TaylorScore:
    """Sums over all rows and columns of a group; g is the gradient of the mean loss, A the mean of squared gradients.

    Attributes:
        order: `first`: Σ|W·g| (Element¹). `second`: Σ|W²·A|. `mixed`: Σ|W·g - W²·A/2| (Element²). `vector`: |Σ W·g|
            within each row or column, then summed.
    """

    order: Literal["first", "second", "mixed", "vector"] = "first"

    @property
    def needs(self) -> frozenset[type]:
        """Gradients of the loss, signed or squared or both."""
        signed = frozenset({LossGradientSum}) if self.order != "second" else frozenset()
        squared = frozenset({LossGradientL2}) if self.order in ("second", "mixed") else frozenset()
        return signed | squared

    def __call__(self, width: Width, matrices: Mapping[str, Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Float32 `[channels]`: each group's worth, shared evenly by its columns."""
        total = torch.zeros(width.groups)
        for axis, members in ((1, width.rows), (0, width.columns)):
            for member in members:
                matrix = matrices[member.matrix]
                lines = self._lines(matrix.weight.float(), stats[member.matrix], axis)
                total += member.of_groups(lines, width.groups).cpu()
        groups = width.consumer.groups
        return (total / torch.bincount(groups, minlength=width.groups))[groups]

    def _lines(self, weight: Tensor, stats: SiteStats, axis: int) -> Tensor:
        """Of every row (axis 1 is summed away) or column (axis 0), float32."""
        if self.order == "vector":
            return (weight * stats[LossGradientSum].mean).sum(axis).abs()
        change = torch.zeros_like(weight)
        if self.order in ("first", "mixed"):
            change += weight * stats[LossGradientSum].mean
        if self.order in ("second", "mixed"):
            half = 1.0 if self.order == "second" else -0.5
            change += half * weight.square() * stats[LossGradientL2].mean.square()
        return change.abs().sum(axis)
