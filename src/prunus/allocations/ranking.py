"""Which of very many numbers are the lowest: exact, without sorting them, keeping none.

The bit pattern of a non-negative float32 number grows with it. A histogram of the high halves of all patterns finds the
k-th lowest to 16 bits; the low halves of what falls into its bin find the rest. So two looks at the numbers suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.sites import Matrix
from prunus.statistics import SiteStats

_BINS = 1 << 15  # high halves of the bit patterns of non-negative float32 numbers

Score = Callable[[Tensor], Tensor]
"""`score(weight [out, in]) -> float32`, at least +0.0, as many as there are weights, in any order."""


class Lost(NamedTuple):
    """What each matrix loses of the lowest scores, but for ties.

    Attributes:
        below: per matrix, how many of its scores are below the threshold: they all go.
        tied: per matrix, how many equal the threshold.
        missing: how many of `tied` must go as well, all matrices together.
    """

    below: list[int]
    tied: list[int]
    missing: int


def lowest(survey: Survey, pruned: int, score: Score) -> Lost:
    """How the `pruned` lowest scores of all matrices are spread over them, in the order of `survey.sites`."""
    if not pruned:
        return Lost([0] * len(survey.sites), [0] * len(survey.sites), 0)
    histogram = sum(survey.measure(_HighHalves(score)).values(), torch.zeros(_BINS, dtype=torch.int64))
    found = survey.measure(_Inside(score, _bin(histogram, pruned)))
    blocks = dict.fromkeys(site.block for site in survey.sites)
    return _split([part for block in blocks for part in _unpack(found[block])], pruned)


def kth_lowest(values: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th lowest, k from 1, of what `values()` yields in parts: float32, at least +0.0. It is called twice."""
    high = _bin(sum(map(_histogram, values()), torch.zeros(_BINS, dtype=torch.int64)), k)
    parts = [part for value in values() for part in _unpack(_look_inside(value, high))]
    pattern = (high << 16) + _threshold(parts, k)
    return float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32))


@dataclass(frozen=True)
class _HighHalves:
    """Histogram of the high halves of a block's scores."""

    score: Score

    def __call__(self, matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Int64 `[2^15]`."""
        total = torch.zeros(_BINS, dtype=torch.int64)
        for matrix in matrices:
            total += _histogram(self.score(matrix.weight))
        return total


@dataclass(frozen=True)
class _Inside:
    """Per matrix: how many scores lie below a bin, and which low halves lie inside, how often."""

    score: Score
    high: int

    def __call__(self, matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Flat int64: for each matrix in turn what `_look_inside` returns."""
        return torch.cat([_look_inside(self.score(matrix.weight), self.high) for matrix in matrices])


def _bits(values: Tensor) -> Tensor:
    """Bit patterns, int32, ascending with the values."""
    assert values.dtype == torch.float32
    return values.contiguous().view(torch.int32).flatten()


def _histogram(values: Tensor) -> Tensor:
    """Of the high halves, int64 `[2^15]`."""
    return torch.bincount(_bits(values) >> 16, minlength=_BINS).cpu()


def _bin(histogram: Tensor, k: int) -> int:
    """The bin that holds the k-th lowest: the first whose cumulative count reaches k."""
    return int(torch.searchsorted(histogram.cumsum(0), k))


def _look_inside(values: Tensor, high: int) -> Tensor:
    """Flat int64: how many are below the bin `high`, number v of low halves in it, the v ascending, their v counts."""
    bits = _bits(values)
    halves, counts = (bits[(bits >> 16) == high] & 0xFFFF).unique(return_counts=True)
    below = int(((bits >> 16) < high).sum())
    return torch.cat([torch.tensor([below, len(halves)]), halves.cpu().long(), counts.cpu()])


Part = tuple[int, Tensor, Tensor]  # below the bin, low halves inside it, their counts


def _unpack(flat: Tensor) -> list[Part]:
    """The matrices of one block, from what `_look_inside` made of each."""
    parts, at = [], 0
    while at < len(flat):
        below, distinct = int(flat[at]), int(flat[at + 1])
        halves = flat[at + 2 : at + 2 + distinct]
        counts = flat[at + 2 + distinct : at + 2 + 2 * distinct]
        parts.append((below, halves, counts))
        at += 2 + 2 * distinct
    return parts


def _threshold(parts: list[Part], k: int) -> int:
    """The low half of the k-th lowest of all."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for _, halves, counts in parts:
        histogram[halves] += counts
    return int(torch.searchsorted(histogram.cumsum(0), k - sum(below for below, _, _ in parts)))


def _split(parts: list[Part], pruned: int) -> Lost:
    """What each matrix loses of `pruned` in all."""
    low = _threshold(parts, pruned)
    below = [count + int(counts[halves < low].sum()) for count, halves, counts in parts]
    tied = [int(counts[halves == low].sum()) for _, halves, counts in parts]
    return Lost(below, tied, pruned - sum(below))
