"""The spectrum of a matrix and the exponent of its tail: heavy-tailed spectra mark well-trained matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

Fit = Literal["peak", "median", "peak_compat"]

_PANEL = 512  # rows of the product at a time; only the lower panels are made
_CELLS = 1 << 20  # of the table of distances at a time: 8 MB
_BINS = 100  # of the histogram whose fullest bin is the peak
_FLAT = 1e-9  # mean log distance to the cut below which there is no tail; float64 sums are good to about 1e-12


def eigenvalues(weight: Tensor, aspect: float = 0.0) -> Tensor:
    """The squared singular values σ_k², ascending, float64; those that are rounding errors of zero are left out.

    Made as eigenvalues of the smaller of WWᵀ and WᵀW in float64. That squares the condition number, which matters to
    the smallest alone: what is below (longer side)·2.2e-16 of the largest is taken for zero.

    Args:
        weight: `[out, in]`, any floating dtype.
        aspect: 0 for the matrix as it is. Else the ratio of the long to the short side, at least 1, of the sub-matrices
            whose squared singular values are taken together (FARMS, Hu et al. 2025): the largest that fit, as few as
            cover the matrix, evenly spaced. A long matrix has a narrower spectrum than a square one of the same
            training; equal shapes can be compared.
    """
    wide = (weight if weight.shape[0] <= weight.shape[1] else weight.T).double()
    values = torch.cat([_squared_singular(part) for part in _parts(wide, aspect)]).sort().values
    return values[values > values[-1:] * max(weight.shape) * torch.finfo(values.dtype).eps]


def tail_exponent(values: Tensor, fit: Fit = "peak") -> float:
    """α of the density λ^-α of the largest of `values` (positive, ascending): Hill's estimator from a cut on.

    Where no cut near the peak serves, the median is the cut. NaN if that does not serve either: there is no tail in
    fewer than three values, nor in equal ones.
    """
    if not len(values):
        return math.nan
    largest = float(values[-1])
    logs = (values / largest).log()
    alpha = _CUTS[fit](logs, largest)
    return _median(logs, largest) if math.isnan(alpha) else alpha


def hill(logs: Tensor) -> Tensor:
    """α(i) = 1 + m / Σ_{k≥i} (ln λ_k - ln λ_i) with m = K - i, for every cut i; NaN where all above the cut are equal.

    Args:
        logs: ln λ, ascending, float64 `[K]`.
    """
    many = torch.arange(len(logs), 0, -1, dtype=logs.dtype, device=logs.device)
    mean = logs.flip(0).cumsum(0).flip(0) / many - logs
    return 1 + 1 / mean.where(mean > _FLAT, torch.nan)


def distances(logs: Tensor, alphas: Tensor, first: int, last: int) -> Tensor:
    """D(i) = max_{k≥i} |1 - (λ_k/λ_i)^(1-α(i)) - (k-i)/m| (Kolmogorov, Smirnov), for the cuts `first <= i < last`.

    Args:
        logs: ln λ, ascending, float64 `[K]`.
        alphas: α(i), `[K]`; NaN gives D = 1, the greatest.
        first: the first cut.
        last: one after the last cut.
    """
    index = torch.arange(len(logs), dtype=logs.dtype, device=logs.device)
    found = [logs.new_zeros(0)]
    for start in range(first, last, max(1, _CELLS // len(logs))):
        cuts = slice(start, min(start + max(1, _CELLS // len(logs)), last))
        rank = index[start:] - index[cuts, None]  # k - i; negative left of the cut
        power = (logs[start:] - logs[cuts, None]).mul_(1 - alphas[cuts, None]).exp_()
        gap = (1 - power).sub_(rank / (len(logs) - index[cuts, None])).abs_()
        found.append(gap.masked_fill_(rank < 0, 0.0).amax(1))
    return torch.cat(found).nan_to_num(nan=1.0)


def _median(logs: Tensor, largest: float) -> float:
    return float(hill(logs)[len(logs) // 2])


def _peak(logs: Tensor, largest: float) -> float:
    peak = _fullest(logs)
    return _best(logs, peak + math.log(0.95), peak + math.log(1.5))


def _peak_compat(logs: Tensor, largest: float) -> float:
    """As published: the lower bound is the logarithm of what was meant, so that the scale of the matrix matters."""
    peak = _fullest(logs)
    bound = math.log10(0.95) + (peak + math.log(largest)) / math.log(10)
    return _best(logs, math.log(bound / largest) if bound > 0 else -math.inf, peak + math.log(1.5))


# How the cut is found: `(ln (λ/λ_max), λ_max) -> α`, NaN if no cut qualifies.
_CUTS: dict[Fit, Callable[[Tensor, float], float]] = {"peak": _peak, "median": _median, "peak_compat": _peak_compat}


def _fullest(logs: Tensor) -> float:
    """The left edge of the fullest of 100 equal bins."""
    low, high = float(logs[0]), float(logs[-1])
    fullest = int(torch.histc(logs, _BINS, low, high).argmax())
    return low + (high - low) * fullest / _BINS


def _best(logs: Tensor, low: float, high: float) -> float:
    """α of the cut with low <= ln λ_i <= high whose tail is nearest to a power law; never the largest λ."""
    first = int((logs < low).sum())
    last = min(int((logs <= high).sum()), len(logs) - 1)
    if first >= last:
        return math.nan
    alphas = hill(logs)
    found = distances(logs, alphas, first, last)
    return float(alphas[first + int(found.argmin())])


def _parts(wide: Tensor, aspect: float) -> Iterator[Tensor]:
    """The sub-matrices of `wide [short, long]` with long = aspect·short; with 0 itself."""
    short, long = wide.shape
    if not aspect:
        yield wide
    elif long > aspect * short:
        yield from _windows(wide, max(short, int(aspect * short)))
    else:
        for part in _windows(wide.T, max(1, int(long / aspect))):
            yield part.T


def _windows(matrix: Tensor, width: int) -> Iterator[Tensor]:
    """As few slices of `width` columns as cover the matrix, evenly spaced."""
    columns = matrix.shape[1]
    many = -(-columns // width)
    for i in range(many):
        start = (columns - width) * i // max(many - 1, 1)
        yield matrix[:, start : start + width]


def _squared_singular(wide: Tensor) -> Tensor:
    """σ_k² of a float64 matrix with no more rows than columns."""
    rows = len(wide)
    product = wide.new_zeros(rows, rows)
    for start in range(0, rows, _PANEL):
        stop = min(start + _PANEL, rows)
        product[start:, start:stop] = wide[start:] @ wide[start:stop].T
    return torch.linalg.eigvalsh(product, UPLO="L").clamp_min_(0)
