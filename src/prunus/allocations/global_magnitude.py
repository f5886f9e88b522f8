"""One magnitude threshold for the whole model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.patterns.selection import count, share
from prunus.sites import Matrix
from prunus.statistics import SiteStats

_LOG = logging.getLogger("prunus")
_BINS = 1 << 15  # high halves of the bit patterns of non-negative float32 numbers


@dataclass(frozen=True)
class GlobalMagnitude:
    """Each matrix loses what it holds of the ⌊s·N + 1e-9⌋ smallest |W| of all matrices; ties go in module order.

    Exact, in two passes over the weights and without sorting: the bit pattern of a non-negative float32 number grows
    with it, so a histogram of the high halves finds the threshold to 16 bits, and the low halves of what falls into
    its bin find the rest. With the magnitude metric and `pattern.group=matrix` this is global magnitude pruning; other
    metrics only take over its sparsities. Matrices on a smaller scale lose more, perhaps everything.
    """

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    needs: ClassVar[frozenset[type]] = frozenset()
    foreseeable: ClassVar[bool] = False

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity, k_i / n_i with whole k_i."""
        histogram = sum(survey.measure(_high_halves).values(), torch.zeros(_BINS, dtype=torch.int64))
        pruned = count(sum(site.size for site in survey.sites), sparsity)
        below = histogram.cumsum(0)
        threshold = int(torch.searchsorted(below, pruned))  # first bin with cumulative count >= pruned
        if threshold >= _BINS or not pruned:
            return dict.fromkeys((site.name for site in survey.sites), 0.0)
        found = survey.measure(_Inside(threshold))
        counts = _divide([part for block in _blocks(survey) for part in _unpack(found[block])], pruned)
        budget = {site.name: share(lost, site.size) for site, lost in zip(survey.sites, counts, strict=True)}
        for name, value in budget.items():
            if value > 0.99:
                _LOG.warning("%s: a global magnitude threshold removes %.2f %% of it.", name, 100 * value)
        return budget


def _bits(weight: Tensor) -> Tensor:
    """Bit patterns of |W|, int32, ascending with |W|."""
    return weight.float().abs().contiguous().view(torch.int32).flatten()


def _high_halves(matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
    """Histogram of the high halves over the block, int64 `[2^15]`."""
    total = torch.zeros(_BINS, dtype=torch.int64)
    for matrix in matrices:
        total += torch.bincount(_bits(matrix.weight) >> 16, minlength=_BINS).cpu()
    return total


@dataclass(frozen=True)
class _Inside:
    """Per matrix: how many lie below a bin, and which low halves lie inside, how often. One flat int64 tensor."""

    threshold: int

    def __call__(self, matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """For each matrix in turn: below, number of values v, v values ascending, their v counts."""
        parts = []
        for matrix in matrices:
            bits = _bits(matrix.weight)
            inside = bits[(bits >> 16) == self.threshold] & 0xFFFF
            values, counts = inside.unique(return_counts=True)
            below = int(((bits >> 16) < self.threshold).sum())
            parts += [torch.tensor([below, len(values)]), values.cpu().long(), counts.cpu()]
        return torch.cat(parts)


Part = tuple[int, Tensor, Tensor]  # below the bin, low halves inside it, their counts


def _unpack(flat: Tensor) -> list[Part]:
    """The matrices of one block, from what `_Inside` returned."""
    parts, at = [], 0
    while at < len(flat):
        below, distinct = int(flat[at]), int(flat[at + 1])
        values = flat[at + 2 : at + 2 + distinct]
        counts = flat[at + 2 + distinct : at + 2 + 2 * distinct]
        parts.append((below, values, counts))
        at += 2 + 2 * distinct
    return parts


def _divide(parts: list[Part], pruned: int) -> list[int]:
    """How many each matrix loses of `pruned` in all; what equals the threshold goes from the first matrices."""
    missing = pruned - sum(below for below, _, _ in parts)
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for _, values, counts in parts:
        histogram[values] += counts
    low = int(torch.searchsorted(histogram.cumsum(0), missing))
    lost = [below + int(counts[values < low].sum()) for below, values, counts in parts]
    missing = pruned - sum(lost)
    for i, (_, values, counts) in enumerate(parts):
        ties = min(int(counts[values == low].sum()), missing)
        lost[i] += ties
        missing -= ties
    return lost


def _blocks(survey: Survey) -> list[str]:
    """Block names in module order."""
    return list(dict.fromkeys(site.block for site in survey.sites))
