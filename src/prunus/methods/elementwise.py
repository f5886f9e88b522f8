"""Metric x pattern x update: every element-wise pruning method."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.edits import Sparse
from prunus.errors import ModelError
from prunus.metrics.metric import Metric, Scorer
from prunus.patterns.pattern import Pattern
from prunus.sites import Matrix, SiteInfo
from prunus.statistics import SiteStats
from prunus.updates.keep import Keep
from prunus.updates.update import Update

_LOG = logging.getLogger("prunus")


@dataclass(frozen=True)
class Choice:
    """Gives an update its masks: the metric's scores of the present weights, cut by the pattern.

    Attributes:
        scorer: of this matrix.
        pattern: which masks are allowed.
        sparsity: of the whole matrix.
        shape: `(out, in)` of the whole matrix.
    """

    scorer: Scorer
    pattern: Pattern
    sparsity: float
    shape: tuple[int, int]

    @property
    def align(self) -> int:
        """Slices start and stop at multiples of this."""
        return self.pattern.align

    def __call__(self, weight: Tensor, columns: slice) -> Tensor:
        """Mask of `weight [out, cols]`, the present values of these columns (a slice with start and stop)."""
        sparsity = self.pattern.portion(self.sparsity, self.shape, columns)
        return self.pattern.keep(self.scorer(weight, columns), sparsity)


@dataclass(frozen=True)
class Elementwise:
    """A method that decides about single weights.

    Attributes:
        metric: which weights matter.
        pattern: which masks are allowed.
        update: what becomes of the kept weights.
        paper: where the combination was published.
    """

    metric: Metric
    pattern: Pattern
    update: Update = field(default_factory=Keep)
    paper: str = ""

    @property
    def needs(self) -> frozenset[type]:
        """Statistics to gather."""
        return self.metric.needs | self.update.needs

    def check(self, info: SiteInfo) -> None:
        """See that a matrix fits the pattern.

        Raises:
            RecipeError: it does not.
        """
        self.pattern.check(info)

    def prune(self, matrix: Matrix, stats: SiteStats, sparsity: float) -> Sparse:
        """Decide about one matrix.

        Args:
            matrix: the dense matrix; not changed.
            stats: of its inputs.
            sparsity: fraction removed, in [0, 1].

        Raises:
            ModelError: if the weights hold NaN or infinity.
            CalibrationError: if the inputs did.
            RecipeError: if the update cannot work with these statistics.
        """
        if not bool(torch.stack(matrix.weight.aminmax()).isfinite().all()):  # NaN and infinity both reach an extreme
            raise ModelError(f"{matrix.name} holds NaN or infinite weights. Repair the checkpoint, or ignore the site.")
        if stats.unseen:
            # The engine warns once, with their number; a rarely used expert is no news by itself.
            _LOG.info("%s saw no calibration token: ranked by magnitude, kept weights unchanged.", matrix.name)
        rows, columns = matrix.weight.shape
        choose = Choice(self.metric(matrix.weight, stats), self.pattern, sparsity, (rows, columns))
        weight, mask = self.update(matrix.weight, choose, stats)
        return Sparse(matrix.name, weight, mask)
