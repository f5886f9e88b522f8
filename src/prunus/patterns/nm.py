"""N of every M consecutive inputs stay."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.patterns.order import arrange
from prunus.patterns.selection import count, keep_highest
from prunus.sites import SiteInfo

_LOG = logging.getLogger("prunus")
_PAIRWISE = 8  # up to this M comparing all pairs beats selecting row by row


@dataclass(frozen=True)
class NM:
    """In each row, of every M consecutive inputs the N with the highest scores stay; among equals the last ones.

    N is what stays, as in hardware; the published codes write how many go. Under an allocation each matrix has its
    own N (`settle`); `n` is then only the target.

    Attributes:
        n: kept of every group, from 1 to m - 1.
        m: group size, at least 2.
        permute: groups are made of columns dealt by how many rows want them, instead of neighbours. The order is kept
            beside the checkpoint; only prunus' own runtime knows what to do with it, GPUs do not.
    """

    n: int = 2
    m: int = 4
    permute: bool = False

    paper: ClassVar[str] = "Mishra et al. 2021, arXiv:2104.08378"

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RecipeError: if not 1 <= n < m.
        """
        if not 1 <= self.n < self.m:
            raise RecipeError(
                f"Pattern {self.n}:{self.m} must keep at least 1 and less than all of every group:"
                " N:M with 1 <= N < M, such as 2:4 or 4:8."
            )

    @property
    def sparsity(self) -> float:
        """1 - N/M, the fraction removed."""
        return 1 - self.n / self.m

    @property
    def align(self) -> int:
        """Columns come in whole groups."""
        return self.m

    @property
    def grouped(self) -> bool:
        """Every group for itself, unless its columns are still to be found among many."""
        return not self.permute

    def arrange(self, scores: Tensor, sparsity: float) -> Tensor | None:
        """See `Pattern.arrange`."""
        return arrange(scores, sparsity, self.m) if self.permute else None

    def at(self, name: str) -> NM:
        """The same for every matrix."""
        return self

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """The mask `[out, cols]` without the ⌊M·sparsity + 1e-9⌋ lowest scores of every group; ties go by index."""
        assert scores.shape[1] % self.m == 0, (scores.shape, self.m)
        pruned = count(self.m, sparsity)
        if self.m > _PAIRWISE:
            return keep_highest(scores.reshape(-1, self.m), pruned).view(scores.shape)
        return _keep_pairwise(scores.unflatten(1, (-1, self.m)), pruned).flatten(1)

    def portion(self, sparsity: float, shape: tuple[int, int], columns: slice) -> float:
        """Every group has the same share, so every slice has."""
        return sparsity

    def check(self, site: SiteInfo) -> None:
        """Refuse a matrix whose rows do not consist of whole groups.

        Raises:
            RecipeError: if in_features is not a multiple of M; choose another pattern or ignore the site.
        """
        if site.shape[1] % self.m:
            raise RecipeError(
                f"{site.name} has {site.shape[1]} inputs, not a multiple of M={self.m}."
                " Use another N:M or unstructured, or leave it alone with --ignore."
            )

    def settle(self, budget: Mapping[str, float], sizes: Mapping[str, int], target: float) -> dict[str, float]:
        """Whole weights per group: the largest fractions are rounded up until the target is met.

        Each matrix removes 0 to M - 1 of every group. The total is met to within half of what one unit of a matrix
        removes; with equal sizes exactly, if whole units can. A budget that is not meant to meet the target (a manual
        one) keeps its own total.
        """
        total = sum(sizes[site] * sparsity for site, sparsity in budget.items())
        aim = target * sum(sizes[site] for site in budget)
        aim = aim if abs(total - aim) < 1e-6 * aim else total
        wanted = {site: min(max(sparsity * self.m, 0.0), self.m - 1.0) for site, sparsity in budget.items()}
        pruned = {site: int(value + 1e-9) for site, value in wanted.items()}
        missing = aim * self.m - sum(sizes[site] * units for site, units in pruned.items())
        step = 1 if missing > 0 else -1
        order = sorted(budget, key=lambda site: step * (pruned[site] - wanted[site]))  # stable: ties in site order
        while any(self._helps(site, sizes, pruned, missing, step) for site in order):
            for site in order:
                if self._helps(site, sizes, pruned, missing, step):
                    pruned[site] += step
                    missing -= step * sizes[site]
        self._warn_if_flat(budget, pruned)
        return {site: units / self.m for site, units in pruned.items()}

    def _warn_if_flat(self, budget: Mapping[str, float], pruned: Mapping[str, int]) -> None:
        """Say so if rounding to whole weights per group has made one sparsity of several."""
        spread = max(budget.values(), default=0.0) - min(budget.values(), default=0.0)
        if spread < 1e-6 or len(set(pruned.values())) > 1:
            return
        kept = self.m - next(iter(pruned.values()))
        _LOG.warning(
            "The allocation's sparsities differ by %.3f, too little for groups of %d: all matrices come out at %d:%d. "
            "A difference above 1/%d would matter (with owl: allocation.span above %.3g); so would a larger M.",
            spread, self.m, kept, self.m, self.m, 0.5 / self.m,
        )  # fmt: skip

    def _helps(self, site: str, sizes: Mapping[str, int], pruned: Mapping[str, int], missing: float, step: int) -> bool:
        """Whether one unit more (or less) in this matrix brings the total nearer to the target."""
        return 0 <= pruned[site] + step < self.m and 2 * step * missing > sizes[site] * (1 - 1e-9)


def _keep_pairwise(groups: Tensor, pruned: int) -> Tensor:
    """Rank by counting: a score goes if fewer than `pruned` of its group come before it. `[rows, groups, m]`."""
    keep = torch.empty_like(groups, dtype=torch.bool)
    before = torch.zeros(groups.shape[-1], *groups.shape[:-1], dtype=torch.int8, device=groups.device)
    arrays: list[Any] = [groups.movedim(-1, 0), before, keep.movedim(-1, 0)]
    if groups.device.type == "cpu":
        # The same operators, but a NumPy call costs a fraction of a torch one, and an update asks group by group.
        arrays = [array.numpy() for array in arrays]
    scores, ranks, kept = (list(array) for array in arrays)
    for i, j in combinations(range(len(scores)), 2):
        later_is_lower = scores[j] < scores[i]
        ranks[i] += later_is_lower
        ranks[j] += ~later_is_lower
    for rank, target in zip(ranks, kept, strict=True):
        target[...] = rank >= pruned
    return keep
