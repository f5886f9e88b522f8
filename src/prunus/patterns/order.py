"""An order of columns in which the heavy ones are spread over the windows."""

from __future__ import annotations

from torch import Tensor

from prunus.patterns.selection import count, keep_highest


def deal(load: Tensor, window: int) -> Tensor:
    """Columns sorted by load and dealt over the windows, to and fro, so that every window gets its share.

    Args:
        load: `[columns]`, how many weights of each column one would like to keep; a multiple of `window` columns.
        window: columns in each window.

    Returns:
        int64 `[columns]`, a permutation: place p, in window p // window, takes column `order[p]`. Within a window the
        columns ascend; among equal loads too, so the same loads give the same order.
    """
    windows = len(load) // window
    heaviest_first = load.argsort(descending=True, stable=True).view(window, windows)
    # Every second round is dealt from the last window to the first: the heaviest of a round meets the lightest.
    heaviest_first[1::2] = heaviest_first[1::2].flip(1)
    return heaviest_first.T.sort(dim=1).values.flatten()


def arrange(scores: Tensor, sparsity: float, window: int) -> Tensor:
    """The order for scores `[out, columns]`: a column's load is the rows that would keep it without windows."""
    return deal(keep_highest(scores, count(scores.shape[1], sparsity)).sum(0), window)
