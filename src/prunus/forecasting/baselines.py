"""What any forecast has to beat: methods of a few lines that read the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prunus.forecasting.chain import after
from prunus.forecasting.serial import Scale

PRIOR = 0.7  # pseudo-counts of each state, as in the density experiments of the llmICL authors


def persistence(past: np.ndarray, steps: int, scale: Scale) -> np.ndarray:
    """The last value for ever."""
    return np.full(steps, past[-1])


def histogram(past: np.ndarray, steps: int, scale: Scale) -> np.ndarray:
    """The mean of what was seen: right for a series without memory."""
    return np.full(steps, past.mean())


def ar1(past: np.ndarray, steps: int, scale: Scale) -> np.ndarray:
    """X' = a + b·x by least squares, b in [-1, 1] so that nothing explodes."""
    before, behind = past[:-1], past[1:]
    spread = before - before.mean()
    slope = float(np.clip((spread @ (behind - behind.mean())) / max(spread @ spread, 1e-300), -1, 1))
    constant = behind.mean() - slope * before.mean()
    path, value = [], past[-1]
    for _ in range(steps):
        value = constant + slope * value
        path.append(value)
    return np.array(path)


def bigram(past: np.ndarray, steps: int, scale: Scale) -> np.ndarray:
    """The mean path of the kernel of counted transitions, smoothed."""
    states = scale.bins(past)
    start = np.eye(scale.states)[states[-1]]
    return after(start, bigram_kernel(states, scale.states), steps) @ scale.values(np.arange(scale.states))


def bigram_kernel(states: np.ndarray, count: int, prior: float = PRIOR) -> np.ndarray:
    """(transitions i -> j + prior) / (transitions out of i + prior * count), [count, count]."""
    counts = np.full((count, count), prior)
    np.add.at(counts, (states[:-1], states[1:]), 1)
    return counts / counts.sum(1, keepdims=True)


def power_law(past: np.ndarray, steps: int, scale: Scale) -> np.ndarray:
    """A + b·t**-c, with c searched in [0.05, 3] and a, b by least squares."""
    times = np.arange(1, len(past) + steps + 1, dtype=float)
    best: tuple[float, np.ndarray] | None = None
    for exponent in np.geomspace(0.05, 3, 60):
        basis = np.stack([np.ones_like(times), times**-exponent], 1)
        weights, *_ = np.linalg.lstsq(basis[: len(past)], past, rcond=None)
        error = float(((basis[: len(past)] @ weights - past) ** 2).sum())
        if best is None or error < best[0]:
            best = error, basis[len(past) :] @ weights
    assert best is not None
    return best[1]


BASELINES: dict[str, Callable[[np.ndarray, int, Scale], np.ndarray]] = {
    "persistence": persistence,
    "AR(1)": ar1,
    "bigram": bigram,
    "power law": power_law,
    "mean": histogram,
}


def skill(error: float, other: float) -> float:
    """1 - error / other: above 0 where the first is smaller; 0 if both are 0, minus infinity if only the other is."""
    if other == 0:
        return 0.0 if error == 0 else -np.inf
    return 1 - error / other
