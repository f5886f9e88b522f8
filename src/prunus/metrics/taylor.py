"""What the loss changes by, to first order, if a weight goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.gradients import LossGradientL1
from prunus.metrics.magnitude import magnitude
from prunus.metrics.metric import Scorer
from prunus.statistics import SiteStats


@dataclass(frozen=True)
class Taylor:
    """|W_ij|·mean over samples of |∂L/∂W_ij| (Molchanov et al. 2019, arXiv:1906.10771, by sample).

    Also GBLM-Pruner's "gradient" variant. Knows nothing of the inputs that the pruned model will give; at high
    sparsity metrics that follow the pruned prefix do better.
    """

    paper: ClassVar[str] = "Molchanov et al. 2019, arXiv:1906.10771"
    needs = frozenset[type]({LossGradientL1})

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]` in nats, float32. Without a token: |W|."""
        if stats.unseen:
            return magnitude
        gradient = stats[LossGradientL1].mean

        def score(weight: Tensor, columns: slice) -> Tensor:
            return magnitude(weight, columns).mul_(gradient[:, columns])

        return score
