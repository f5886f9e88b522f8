"""One threshold for the whole model, on weights measured against their own matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.allocations.project import HIGHEST, project
from prunus.allocations.ranking import Lost, lowest
from prunus.patterns.selection import count, share


@dataclass(frozen=True)
class LAMP:
    """Each matrix loses what it holds of the ⌊s·N + 1e-9⌋ lowest w_(u)² / Σ_{v≥u} w_(v)² (Lee et al. 2021).

    w_(u) are the weights of one matrix in ascending order of magnitude, so the score is a weight's share of what is
    left of its matrix when all smaller ones are gone. Unlike global magnitude it does not see the scale of a matrix:
    the largest weight of each scores 1. Exact, in two passes over the weights; ties are shared out in proportion.
    A matrix that would lose more than 99 % keeps 1 %, and all others make up for it alike.
    """

    paper: ClassVar[str] = "Lee et al. 2021, arXiv:2010.07611"
    needs = frozenset[type]()
    foreseeable: ClassVar[bool] = False

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity, k_i / n_i with whole k_i unless the bound of 0.99 is met.

        Raises:
            RecipeError: if the target is above 0.99.
        """
        sizes = {site.name: site.size for site in survey.sites}
        lost = _evenly(lowest(survey, count(sum(sizes.values()), sparsity), lamp))
        budget = {name: share(many, sizes[name]) for name, many in zip(sizes, lost, strict=True)}
        within = max(budget.values(), default=0.0) <= HIGHEST
        return budget if within else project(budget, sizes, sparsity)


def lamp(weight: Tensor) -> Tensor:
    """The scores of a matrix, ascending with |w|, float32 `[out·in]`; those of zeros are 0."""
    squares = _ascending(weight.flatten().float().abs()).double().square_()
    left = squares.flip(0).cumsum_(0).flip(0)
    # Zeros in a matrix of zeros: 0 / 0 would be NaN.
    return (squares / left.clamp_min_(torch.finfo(torch.float64).tiny)).float()


def _ascending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))  # vectorised: twenty times as fast as torch.sort
    return values.sort().values


def _evenly(lost: Lost) -> list[int]:
    """How many each matrix loses; of ties each gives the same share, to one weight.

    In module order, as global magnitude has it, a model of equal weights would lose its first blocks.
    """
    total = max(sum(lost.tied), 1)
    counts, before = [], 0
    for below, tied in zip(lost.below, lost.tied, strict=True):
        after = before + tied
        counts.append(below + lost.missing * after // total - lost.missing * before // total)
        before = after
    return counts
