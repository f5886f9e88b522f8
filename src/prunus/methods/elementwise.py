"""Metric x pattern x update: every element-wise pruning method."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.edits import Sparse
from prunus.errors import ModelError, RecipeError
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
        orders: first column of a slice -> the order in which the pattern sees its columns; found when the slice is
            first asked for, and kept, so that a later mask obeys the same windows.
    """

    scorer: Scorer
    pattern: Pattern
    sparsity: float
    shape: tuple[int, int]
    orders: dict[int, Tensor] = field(default_factory=dict)

    @property
    def align(self) -> int:
        """Slices start and stop at multiples of this."""
        return self.pattern.align

    @property
    def grouped(self) -> bool:
        """See `Pattern.grouped`."""
        return self.pattern.grouped

    @property
    def order(self) -> Tensor | None:
        """int64 `[in]`: place p of the windows is column `order[p]`; None if the pattern took columns as they are."""
        parts = [start + order for start, order in sorted(self.orders.items(), key=lambda item: item[0])]
        return torch.cat(parts) if parts else None

    def __call__(self, weight: Tensor, columns: slice) -> Tensor:
        """Mask of `weight [out, cols]`, the present values of these columns (a slice with start and stop)."""
        sparsity = self.pattern.portion(self.sparsity, self.shape, columns)
        scores = self.scorer(weight, columns)
        if columns.start not in self.orders:
            order = self.pattern.arrange(scores, sparsity)
            if order is None:
                return self.pattern.keep(scores, sparsity)
            self.orders[columns.start] = order
        order = self.orders[columns.start]
        mask = torch.empty_like(scores, dtype=torch.bool)
        mask[:, order] = self.pattern.keep(scores[:, order], sparsity)
        return mask


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

    def __post_init__(self) -> None:
        """See that the update can live with the pattern's order of columns.

        Raises:
            RecipeError: if it swaps weights of neighbouring columns, and the pattern deals them anew.
        """
        if getattr(self.pattern, "permute", False) and getattr(self.update, "neighbours", False):
            raise RecipeError(
                f"The update {type(self.update).__name__} swaps within groups of neighbouring inputs, and "
                "pattern.permute makes groups of others. Leave pattern.permute out, or take another update."
            )

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
        choose = Choice(self.metric(matrix.weight, stats), self.pattern.at(matrix.name), sparsity, (rows, columns))
        weight, mask = self.update(matrix.weight, choose, stats)
        return Sparse(matrix.name, weight, mask, choose.order)
