"""The size of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.metrics.metric import Scorer
from prunus.statistics import SiteStats


@dataclass(frozen=True)
class Magnitude:
    """|W_ij|. Needs no data; the baseline every other metric must beat."""

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    needs = frozenset[type]()

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]` in the units of the weight; reads no statistic."""
        return magnitude


def magnitude(weight: Tensor, columns: slice) -> Tensor:
    """|W| of the given columns, float32 or better: the same ranking as in any narrower dtype."""
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
