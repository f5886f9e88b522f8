"""What a metric is: scores for the weights of one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

from prunus.statistics import SiteStats

Scorer = Callable[[Tensor, slice], Tensor]
"""`scorer(weight [out, cols], columns) -> scores [out, cols]`, float32 or better; larger = more worth keeping.

`weight` are the values as they are *now* in these columns of the matrix, perhaps already corrected by an update.
"""


class Metric(Protocol):
    """Says which weights of a matrix matter. A frozen dataclass whose fields are its hyper-parameters."""

    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[type]:
        """Types of statistics that it reads."""
        ...

    def __call__(self, weight: Tensor, stats: SiteStats) -> Scorer:
        """Prepare the scores of one matrix.

        Args:
            weight: `[out, in]`, the dense matrix; never changed.
            stats: of its inputs; only the types in `needs` are read. A matrix that saw no token (`stats.unseen`) has
                no evidence: its scores rank as magnitude.
        """
        ...
