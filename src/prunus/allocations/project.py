"""Shift or scale wanted sparsities so that they meet a target within bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from prunus.errors import RecipeError

HIGHEST = 0.99  # below 1, for an emptied matrix cuts the network


def project(
    raw: Mapping[str, float], sizes: Mapping[str, int], target: float, low: float = 0.0, high: float = HIGHEST
) -> dict[str, float]:
    """s_g = clip(r_g + t, low, high) with the one t for which Σ n_g·s_g = target·Σ n_g.

    Equals the published formulas where nothing clips. Differences between groups are kept as far as the bounds allow.

    Args:
        raw: group -> wanted sparsity r_g, any real number.
        sizes: group -> number of weights n_g.
        target: sparsity of all groups together.
        low: least sparsity of a group.
        high: greatest sparsity of a group.

    Raises:
        RecipeError: if the target is outside [low, high]; says by how much.
    """
    reachable(target, low, high)
    wanted, share = _arrays(raw, sizes)
    bends = np.unique(np.concatenate([low - wanted, high - wanted]))
    return _meet(raw, share, target, bends, lambda shift: np.clip(wanted + shift, low, high))


def scale(
    raw: Mapping[str, float], sizes: Mapping[str, int], target: float, low: float = 0.0, high: float = HIGHEST
) -> dict[str, float]:
    """s_g = clip(t·r_g, low, high) with the one t for which Σ n_g·s_g = target·Σ n_g.

    The sibling of `project` for formulas that multiply: ratios between groups are kept as far as the bounds allow.
    Whether r_g and s_g are sparsities or densities is the caller's affair.

    Args:
        raw: group -> wanted share r_g, above 0; only their ratios count.
        sizes: group -> number of weights n_g.
        target: share of all groups together.
        low: least share of a group, at least 0.
        high: greatest share of a group.

    Raises:
        RecipeError: if the target is outside [low, high]; says by how much.
    """
    reachable(target, low, high)
    wanted, share = _arrays(raw, sizes)
    assert (wanted > 0).all(), "only shares above 0 can be scaled"
    bends = np.unique(np.concatenate([low / wanted, high / wanted]))
    return _meet(raw, share, target, bends, lambda factor: np.clip(wanted * factor, low, high))


def reachable(target: float, low: float, high: float) -> None:
    """Nothing, if the target can be met.

    Raises:
        RecipeError: if it is outside [low, high]; says by how much.
    """
    if not low <= target <= high:
        bound, name = (low, "least") if target < low else (high, "most")
        raise RecipeError(
            f"Sparsity {target:g} cannot be reached: {name} allowed for each site is {bound:g},"
            f" {abs(target - bound):.3g} away. Ask for {bound:g}, or use --set allocation=uniform."
        )


def _arrays(raw: Mapping[str, float], sizes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """What is wanted, and each group's part of all weights."""
    size = np.array([sizes[group] for group in raw], dtype=np.float64)
    return np.array([raw[group] for group in raw], dtype=np.float64), size / max(size.sum(), 1.0)


def _meet(
    groups: Mapping[str, float],
    share: np.ndarray,
    target: float,
    bends: np.ndarray,
    shares: Callable[[float], np.ndarray],
) -> dict[str, float]:
    """`shares(t)` at the t where their mean is the target: it is piecewise linear in t, bending at `bends`."""
    if not groups:
        return {}
    means = np.array([share @ shares(float(bend)) for bend in bends])
    after = int(np.searchsorted(means, target))
    if 0 < after < len(bends):
        rise = means[after] - means[after - 1]
        at = bends[after - 1] + (target - means[after - 1]) / rise * (bends[after] - bends[after - 1])
    else:
        at = bends[min(after, len(bends) - 1)]
    return dict(zip(groups, shares(float(at)).tolist(), strict=True))
