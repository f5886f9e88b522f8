"""Weight times the size of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.metrics.magnitude import magnitude
from prunus.metrics.metric import Scorer
from prunus.statistics import InputNorm, SiteStats


@dataclass(frozen=True)
class Wanda:
    """|W_ij|·‖X_j‖₂ (Sun et al. 2023, eq. 1), the norm divided by √samples as in the published code.

    Ranks within a row; no gradient, no inverse. The best first choice up to 50 %.
    """

    paper: ClassVar[str] = "Sun et al. 2023, arXiv:2306.11695"
    needs = frozenset[type]({InputNorm})

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Scores `[out, cols]` in units of the output, float32. Without a token: |W|."""
        if stats.unseen:
            return magnitude
        norm = stats[InputNorm].norm

        def score(weight: Tensor, columns: slice) -> Tensor:
            return magnitude(weight, columns).mul_(norm[columns])

        return score
