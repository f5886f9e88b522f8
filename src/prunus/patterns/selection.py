"""Exact counts: which k of n scores are the lowest, ties by index, without sorting."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def count(numel: int, sparsity: float) -> int:
    """⌊numel·sparsity + 1e-9⌋: how many go. The published codes truncate `int(100 * 0.29)` to 28; this gives 29."""
    return math.floor(numel * sparsity + 1e-9)


def share(pruned: int, numel: int) -> float:
    """A sparsity for which `count(numel, sparsity)` is `pruned`: their quotient, or the next float above it."""
    sparsity = pruned / numel if numel else 0.0
    while count(numel, sparsity) < pruned:
        sparsity = math.nextafter(sparsity, math.inf)
    return sparsity


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """True for all but the `pruned` lowest scores of each row; among equals the first ones go.

    The result is that of a stable ascending sort. +0.0 and -0.0 are equal; NaN counts as highest.

    Args:
        scores: `[rows, n]`, a floating dtype.
        pruned: how many go in each row, from 0 to n.

    Returns:
        bool `[rows, n]`, True = kept.
    """
    if pruned <= 0 or pruned >= scores.shape[1]:
        return torch.full_like(scores, pruned <= 0, dtype=torch.bool)
    threshold = _kth_lowest(scores, pruned)
    keep = ~(scores <= threshold)
    if int(keep.sum()) == len(scores) * (scores.shape[1] - pruned):
        return keep  # no score equals the threshold but the threshold itself
    keep |= _late_ties(scores, threshold, pruned)
    return keep


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, k from 1: `[rows, 1]`."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # Vectorised introselect: several times faster than torch.kthvalue on a CPU.
        parted = np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k]
        return torch.from_numpy(np.ascontiguousarray(parted))
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _late_ties(scores: Tensor, threshold: Tensor, pruned: int) -> Tensor:
    """True for the scores that equal the threshold of their row but come after the quota is full."""
    tied = scores == threshold
    row, column = tied.nonzero(as_tuple=True)  # row by row, columns ascending
    quota = pruned - (scores < threshold).sum(1)
    tied_count = tied.sum(1)
    first = tied_count.cumsum(0) - tied_count
    late = torch.arange(len(row), device=row.device) - first[row] >= quota[row]
    tied[row, column] = late
    return tied
