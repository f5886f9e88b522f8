"""A finite Markov chain: its missing rows, its long run, how long things take. Kernels are float64 [states, states]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Steps after which a chain is taken to have reached its long run: modes with |eigenvalue| < 0.999 have died out.
LONG = 1 << 13
SLOW = 1e-3


def barycenter(low: np.ndarray, high: np.ndarray, share: float) -> np.ndarray:
    """The Wasserstein-2 barycenter of two laws on 0 … n-1: the law whose quantiles are the weighted means of theirs.

    Mass that falls between two states is split linearly, so the mean is exact.

    Args:
        low: law [n], of weight 1 - share.
        high: law [n], of weight share.
        share: in [0, 1].
    """
    ends = [np.cumsum(law) / law.sum() for law in (low, high)]
    levels = np.unique(np.clip(np.concatenate([[0.0], *ends]), 0, 1))
    middle = (levels[1:] + levels[:-1]) / 2
    quantiles = [np.searchsorted(end, middle).clip(0, len(low) - 1) for end in ends]
    return _split((1 - share) * quantiles[0] + share * quantiles[1], np.diff(levels), len(low))


def fill(rows: dict[int, np.ndarray], states: int, *, extrapolate: str = "shift") -> np.ndarray:
    """A whole kernel from known rows, which are kept as they are.

    Args:
        rows: state -> law [states]; at least one.
        states: how many there are.
        extrapolate: beyond the outermost known rows: "shift" copies the nearest, moved by the distance and clipped;
            "hold" copies it.
    """
    known = np.array(sorted(rows))
    kernel = np.zeros((states, states))
    for state in range(states):
        place = int(np.searchsorted(known, state))
        if place < len(known) and known[place] == state:
            kernel[state] = rows[state]
        elif 0 < place < len(known):
            low, high = known[place - 1], known[place]
            kernel[state] = barycenter(rows[low], rows[high], (state - low) / (high - low))
        else:
            nearest = known[0] if place == 0 else known[-1]
            moved = np.arange(states) + (state - nearest if extrapolate == "shift" else 0)
            kernel[state] = _split(moved.clip(0, states - 1).astype(float), rows[nearest], states)
    return kernel


def regular(kernel: np.ndarray, share: float = 1e-6) -> np.ndarray:
    """The kernel with a little of the uniform law in every row, so that its stationary law is unique."""
    return (1 - share) * kernel + share / len(kernel)


def stationary(kernel: np.ndarray) -> np.ndarray:
    """The law with law @ kernel = law, of an irreducible kernel (Grassmann, Taksar, Heyman 1985: nothing cancels)."""
    work = kernel.astype(float).copy()
    states = len(work)
    for last in range(states - 1, 0, -1):
        work[:last, last] /= work[last, :last].sum()
        work[:last, :last] += np.outer(work[:last, last], work[last, :last])
    law = np.zeros(states)
    law[0] = 1.0
    for state in range(1, states):
        law[state] = law[:state] @ work[:state, state]
    return law / law.sum()


def moduli(kernel: np.ndarray) -> np.ndarray:
    """Absolute values of the eigenvalues, largest first."""
    return np.sort(np.abs(np.linalg.eigvals(kernel)))[::-1]


def long_run(kernel: np.ndarray) -> np.ndarray:
    """Row i: where a start in i is after `LONG` steps, [states, states]."""
    power = kernel
    for _ in range(LONG.bit_length() - 1):
        power = power @ power
        power /= power.sum(1, keepdims=True)
    return power


@dataclass(frozen=True)
class Limit:
    """One place where the chain ends up.

    Attributes:
        law: over states [states].
        starts: the states whose long run is this, bool [states].
    """

    law: np.ndarray
    starts: np.ndarray


def limits(kernel: np.ndarray) -> list[Limit]:
    """The separate long runs: one where the chain mixes within `LONG` steps; starts in between belong to none."""
    runs = long_run(kernel)
    count = int((moduli(kernel) > 1 - SLOW).sum())
    if count <= 1:
        return [Limit(runs.mean(0), np.ones(len(kernel), dtype=bool))]
    alike = np.abs(runs[:, None] - runs[None]).sum(-1) < 0.2
    # A start in a closed class spends its long run among starts like itself; one in between does not.
    own = (runs * alike).sum(1)
    found: list[Limit] = []
    free = np.ones(len(kernel), dtype=bool)
    for state in np.argsort(-own, kind="stable"):
        if free[state] and own[state] > 0.5 and len(found) < count:
            found.append(Limit(runs[state], alike[state] & free))
            free &= ~alike[state]
    return found or [Limit(runs.mean(0), np.ones(len(kernel), dtype=bool))]


def after(start: np.ndarray, kernel: np.ndarray, steps: int) -> np.ndarray:
    """The laws after 1 … steps steps from the law `start`, [steps, states]."""
    laws = []
    for _ in range(steps):
        start = start @ kernel
        laws.append(start)
    return np.array(laws)


def hitting_time(kernel: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Expected steps until the chain is in `goal` for the first time, from every state; infinite where it may never be.

    Args:
        kernel: rows sum to 1.
        goal: bool [states].
    """
    stopped = np.where(goal[:, None], np.eye(len(kernel)), kernel)
    endless = _reaches(stopped, ~_reaches(stopped, goal))
    inside = ~endless & ~goal
    times = np.where(endless, np.inf, 0.0)
    inner = kernel[np.ix_(inside, inside)]
    times[inside] = np.linalg.solve(np.eye(len(inner)) - inner, np.ones(len(inner)))
    return times


def _reaches(kernel: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The states from which some path leads into `goal`, bool [states]."""
    found = goal.astype(bool)
    while True:
        more = found | ((kernel > 0).astype(float) @ found > 0)
        if (more == found).all():
            return found
        found = more


def wasserstein(one: np.ndarray, two: np.ndarray) -> float:
    """W1 between two laws on 0 … n-1, in states."""
    return float(np.abs(np.cumsum(one - two)).sum())


def quantile(law: np.ndarray, level: float) -> int:
    """The first state at which the law's sum reaches `level`."""
    return int(np.searchsorted(np.cumsum(law), level - 1e-12).clip(0, len(law) - 1))


def _split(places: np.ndarray, masses: np.ndarray, states: int) -> np.ndarray:
    """Masses at real places, each shared by the two states around it; divided so that the sum is 1."""
    law = np.zeros(states)
    floor = np.floor(places + 1e-12).astype(int)
    part = np.maximum(places - floor, 0)
    np.add.at(law, floor, masses * (1 - part))
    np.add.at(law, np.minimum(floor + 1, states - 1), masses * part)
    return law / law.sum()
