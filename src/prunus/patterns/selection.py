"""Exact counts: which k of n scores are the lowest, ties by index, without sorting."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def count(numel: int, sparsity: float) -> int:
    """⌊numel·sparsity + 1e-9⌋: how many go. The published codes truncate `int(100 * 0.29)` to 28; this gives 29.

    From some 10⁶ on the allowance grows with numel, since floats of that size are more than 1e-9 apart.
    """
    return math.floor(numel * sparsity + max(1e-9, 1e-15 * numel))


def share(pruned: int, numel: int) -> float:
    """A sparsity for which `count(numel, sparsity)` is `pruned`: their quotient, or the next float above it."""
    sparsity = pruned / numel if numel else 0.0
    while count(numel, sparsity) < pruned:
        sparsity = math.nextafter(sparsity, math.inf)
    return sparsity


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """True for all but the `pruned` lowest scores of each row; among equals the first ones go.

    The result is that of a stable ascending sort. +0.0 and -0.0 are equal.

    Args:
        scores: `[rows, n]`, a floating dtype, no NaN.
        pruned: how many go in each row, from 0 to n.

    Returns:
        bool `[rows, n]`, True = kept, laid out in memory as the scores are.
    """
    if pruned <= 0 or pruned >= scores.shape[1]:
        return torch.full_like(scores, pruned <= 0, dtype=torch.bool)
    threshold = kth_lowest(scores, pruned)
    keep = scores > threshold
    if int(keep.count_nonzero()) < len(scores) * (scores.shape[1] - pruned):
        row, column = (scores == threshold).nonzero(as_tuple=True)  # row by row, columns ascending
        tied = torch.bincount(row, minlength=len(scores))
        place = torch.arange(len(row), device=row.device) - (tied.cumsum(0) - tied)[row]
        late = place >= (pruned - (scores < threshold).sum(1))[row]
        keep[row[late], column[late]] = True
    return keep


def keep_highest_overall(scores: Tensor, pruned: int) -> Tensor:
    """`keep_highest` of the whole matrix as one row, index = row by row."""
    if pruned <= 0 or pruned >= scores.numel():
        return torch.full_like(scores, pruned <= 0, dtype=torch.bool)
    # The threshold does not depend on the order; reading along memory spares a transposed copy.
    along = scores.T if scores.T.is_contiguous() else scores
    threshold = kth_lowest(along.reshape(1, -1), pruned)
    keep = scores > threshold
    missing = scores.numel() - pruned - int(keep.count_nonzero())
    if missing:
        row, column = (scores == threshold).nonzero(as_tuple=True)
        keep[row[len(row) - missing :], column[len(row) - missing :]] = True
    return keep


def kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, k from 1: `[rows, 1]`."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # Vectorised introselect: several times faster than torch.kthvalue on a CPU.
        parted = np.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k]
        return torch.from_numpy(np.ascontiguousarray(parted))
    return scores.kthvalue(k, dim=1, keepdim=True).values
