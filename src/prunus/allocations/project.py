"""Shift wanted sparsities so that they meet a target within bounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunus.errors import RecipeError


def project(
    raw: Mapping[str, float], sizes: Mapping[str, int], target: float, low: float = 0.0, high: float = 0.99
) -> dict[str, float]:
    """s_g = clip(r_g + t, low, high) with the one t for which Σ n_g·s_g = target·Σ n_g.

    Equals the published formulas where nothing clips. Differences between groups are kept as far as the bounds allow.

    Args:
        raw: group -> wanted sparsity r_g, any real number.
        sizes: group -> number of weights n_g.
        target: sparsity of all groups together.
        low: least sparsity of a group.
        high: greatest sparsity of a group; below 1, for an emptied matrix cuts the network.

    Raises:
        RecipeError: if the target is outside [low, high]; says by how much.
    """
    if not low <= target <= high:
        bound, name = (low, "least") if target < low else (high, "most")
        raise RecipeError(
            f"Sparsity {target:g} cannot be reached: {name} allowed for each site is {bound:g},"
            f" {abs(target - bound):.3g} away. Ask for {bound:g}, or use --set allocation=uniform."
        )
    if not raw:
        return {}
    wanted = np.array([raw[group] for group in raw], dtype=np.float64)
    size = np.array([sizes[group] for group in raw], dtype=np.float64)
    share = size / size.sum()
    shift = _shift(wanted, share, target, low, high)
    return dict(zip(raw, np.clip(wanted + shift, low, high).tolist(), strict=True))


def _shift(wanted: np.ndarray, share: np.ndarray, target: float, low: float, high: float) -> float:
    """The t of `project`: the mean is piecewise linear in t, bending where a group reaches a bound."""
    bends = np.unique(np.concatenate([low - wanted, high - wanted]))
    means = np.array([share @ np.clip(wanted + bend, low, high) for bend in bends])
    after = int(np.searchsorted(means, target))
    if after == 0:
        return float(bends[0])
    if after == len(bends):
        return float(bends[-1])
    rise = means[after] - means[after - 1]
    return float(bends[after - 1] + (target - means[after - 1]) / rise * (bends[after] - bends[after - 1]))
