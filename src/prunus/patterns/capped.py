"""Unstructured, but no window of neighbours may keep more than a fast kernel has room for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.patterns.order import arrange
from prunus.patterns.selection import count, keep_highest, keep_highest_overall
from prunus.patterns.unstructured import Group, Unstructured
from prunus.sites import SiteInfo


@dataclass(frozen=True)
class Capped:
    """At most K of every M consecutive inputs stay; within that, the highest scores of each row or of the matrix.

    Of every window the K highest scores may stay, and of those the lowest go until the count is exact: no other allowed
    mask keeps a larger sum. prunus' own runtime gives every window K slots, so nothing overflows. Real models have
    heavy columns, which crowd some windows: a K a third above the mean costs little, one near the mean much.

    Attributes:
        k: most that a window keeps, from 1 to m.
        m: columns in a window, at least 2; the runtime's is 16.
        permute: windows are made of columns dealt by how many rows want them, instead of neighbours. The order is found
            in each matrix, or in each block of columns that an update fixes together, and is kept beside the
            checkpoint; packing stores it. Costs the runtime one gather of the activations.
        group: what competes beside the cap: `row` or `matrix`.
    """

    k: int = 6
    m: int = 16
    permute: bool = False
    group: Group = "row"

    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: if not 1 <= k <= m, or the group is unknown.
        """
        if not 1 <= self.k <= self.m or self.m < 2:
            raise RecipeError(
                f"Pattern capped:{self.k}/{self.m} must keep at least 1 and at most all of every window: "
                "capped:K/M with 1 <= K <= M, such as capped:6/16."
            )
        Unstructured(self.group)  # checks the name

    @property
    def align(self) -> int:
        """Columns come in whole windows."""
        return self.m

    @property
    def grouped(self) -> bool:
        """Windows compete with each other for what the cap leaves."""
        return False

    @property
    def least(self) -> float:
        """The sparsity that the cap alone enforces, 1 - K/M."""
        return 1 - self.k / self.m

    def at(self, name: str) -> Capped:
        """The same for every matrix."""
        return self

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """The mask `[out, cols]` without the ⌊n·sparsity + 1e-9⌋ lowest scores that the cap allows; ties go by index.

        Raises:
            RecipeError: if the sparsity is below 1 - K/M.
        """
        assert scores.shape[1] % self.m == 0, (scores.shape, self.m)
        lines, width = (len(scores), scores.shape[1]) if self.group == "row" else (1, scores.numel())
        pruned = count(width, sparsity)
        if pruned < scores.numel() // lines // self.m * (self.m - self.k):
            raise RecipeError(self._too_dense(sparsity))
        allowed = keep_highest(scores.reshape(-1, self.m), self.m - self.k).view(scores.shape)
        # What the cap forbids goes first, whatever its score.
        ranked = scores.float().masked_fill(~allowed, -torch.inf)
        return keep_highest(ranked, pruned) if self.group == "row" else keep_highest_overall(ranked, pruned)

    def arrange(self, scores: Tensor, sparsity: float) -> Tensor | None:
        """See `Pattern.arrange`."""
        return arrange(scores, sparsity, self.m) if self.permute else None

    def portion(self, sparsity: float, shape: tuple[int, int], columns: slice) -> float:
        """As unstructured: the remainder is carried from slice to slice. Whole windows never fall below the cap's."""
        return Unstructured(self.group).portion(sparsity, shape, columns)

    def check(self, site: SiteInfo) -> None:
        """Refuse a matrix whose rows do not consist of whole windows.

        Raises:
            RecipeError: if in_features is not a multiple of M; choose another M or ignore the site.
        """
        if site.shape[1] % self.m:
            raise RecipeError(
                f"{site.name} has {site.shape[1]} inputs, not a multiple of M={self.m}."
                " Use another capped:K/M or unstructured, or leave it alone with --ignore."
            )

    def settle(self, budget: Mapping[str, float], sizes: Mapping[str, int], target: float) -> dict[str, float]:
        """No matrix below 1 - K/M; what that removes too much, the others keep, in proportion to their room.

        Raises:
            RecipeError: if the whole budget is below 1 - K/M.
        """
        total = sum(sizes[site] * sparsity for site, sparsity in budget.items())
        least = self.least
        if total < (least - 1e-9) * sum(sizes[site] for site in budget):
            raise RecipeError(self._too_dense(total / sum(sizes[site] for site in budget)))
        raised = {site: max(sparsity, least) for site, sparsity in budget.items()}
        excess = sum(sizes[site] * raised[site] for site in budget) - total
        room = sum(sizes[site] * (raised[site] - least) for site in budget)
        if excess <= 1e-9 * max(total, 1.0):
            return raised
        left = 1 - min(excess / room, 1.0) if room else 0.0
        return {site: least + (sparsity - least) * left for site, sparsity in raised.items()}

    def _too_dense(self, sparsity: float) -> str:
        enough = min(self.m, math.ceil(self.m * (1 - sparsity) * 4 / 3 - 1e-9))
        return (
            f"capped:{self.k}/{self.m} removes at least {self.least:.4g} of the weights, more than the {sparsity:.4g} "
            f"that is asked. Raise the sparsity, or K: a third above the mean costs little, capped:{enough}/{self.m}."
        )
