"""Is a model worse than the dense one on the same items, or is it noise? McNemar and the paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.05  # of the tests; intervals cover 1 - LEVEL
CHUNK = 1 << 22  # drawn counts that exist at once


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: min(1, 2·P[Binomial(lost + gained, ½) ≤ min(lost, gained)]).

    Args:
        lost: items that the dense model gets right and the other wrong.
        gained: the other way round.
    """
    total, least = lost + gained, min(lost, gained)
    log_half = total * math.log(2)
    terms = (
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - log_half)
        for k in range(least + 1)
    )
    return min(1.0, 2 * math.fsum(terms))


def resampled_means(differences: Sequence[float] | np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of `RESAMPLES` samples, drawn from the differences with replacement; float64 [RESAMPLES].

    Drawn as multinomial counts of the distinct values, which is the same law and, with three values, a thousand times
    less work.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    rows = max(1, CHUNK // len(values))
    drawn = [
        generator.multinomial(total, counts / total, size=min(rows, RESAMPLES - start)) @ values / total
        for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(drawn)


def versus(
    items: Sequence[float], dense: Sequence[float], *, higher_is_better: bool = True, seed: int = 0
) -> dict[str, Any]:
    """A model beside the dense one on the same items.

    Args:
        items: the model's score of each item, such as 1 for right and 0 for wrong.
        dense: the dense model's, in the same order.
        higher_is_better: of the score.
        seed: of the bootstrap.

    Returns:
        difference (mean of items minus dense), low and high (95 % interval, paired bootstrap), p (McNemar's exact test
        where every score is 0 or 1, else twice the smaller tail of the bootstrap), lost and gained (items that only
        the dense model, or only this one, got right; None where scores are no 0 or 1) and verdict, in words.
    """
    assert len(items) == len(dense) and len(items) > 0, "paired scores are of the same items"
    changes = np.asarray(items, dtype=np.float64) - np.asarray(dense, dtype=np.float64)
    means = resampled_means(changes, np.random.default_rng(seed))
    binary = set(items) | set(dense) <= {0.0, 1.0}
    lost, gained = int((changes < 0).sum()), int((changes > 0).sum())
    p = mcnemar(lost, gained) if binary else tail(means)
    return {
        **interval(float(changes.mean()), means),
        "p": p,
        "test": "McNemar" if binary else "bootstrap",
        "lost": lost if binary else None,
        "gained": gained if binary else None,
        "verdict": verdict(float(changes.mean()) * (1 if higher_is_better else -1), p),
    }


def versus_group(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> dict[str, Any]:
    """The unweighted mean over tasks of `versus`'s differences; each task is resampled by itself.

    Args:
        pairs: by task, the model's scores and the dense model's, of the same items; higher is better.
        seed: of the bootstrap.

    Returns:
        difference, low, high, p (twice the smaller tail of the bootstrap), test and verdict.
    """
    generator = np.random.default_rng(seed)
    changes = [np.asarray(items, dtype=np.float64) - np.asarray(dense) for items, dense in pairs.values()]
    means = np.mean([resampled_means(change, generator) for change in changes], axis=0)
    difference, p = float(np.mean([change.mean() for change in changes])), tail(means)
    return {**interval(difference, means), "p": p, "test": "bootstrap", "verdict": verdict(difference, p)}


def interval(difference: float, means: np.ndarray) -> dict[str, float]:
    """The difference with its percentile interval."""
    low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
    return {"difference": difference, "low": float(low), "high": float(high)}


def tail(means: np.ndarray) -> float:
    """Twice the share of resampled means on the far side of zero, at most 1; never 0, since resamples are finite."""
    least = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (len(means) + 1))


def verdict(gain: float, p: float) -> str:
    """`worse`, `better`, `the same`, or that the noise hides it; `gain` is positive where the model is better."""
    if p < LEVEL:
        return "better" if gain > 0 else "worse"
    if abs(gain) < 1e-12:  # a mean of thirds need not be exactly zero
        return "the same on average"
    return "no better within the noise" if gain > 0 else "no worse within the noise"
