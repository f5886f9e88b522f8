"""Sets of indices as short text: `0-5,7,9-12`."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor


def ranges(keep: Tensor) -> str:
    """The indices at which a bool vector is True."""
    index = keep.nonzero().flatten().tolist()
    runs = [[item for _, item in run] for _, run in groupby(enumerate(index), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read_ranges(text: str, length: int) -> Tensor:
    """The bool vector that `ranges` wrote."""
    keep = torch.zeros(length, dtype=torch.bool)
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        keep[int(first) : int(last or first) + 1] = True
    return keep
