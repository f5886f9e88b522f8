"""Blocks whose weights the loss depends on keep more."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.errors import RecipeError, near
from prunus.gradients import LossGradientL1
from prunus.patterns.selection import share
from prunus.sites import Matrix, block_sizes
from prunus.statistics import SiteStats
from prunus.trials import Losses, WholeModel

_LOG = logging.getLogger("prunus")
_CHUNK = 1 << 16  # weights perturbed at a time: the noise never is a second copy of the matrix

Order = Literal["zeroth", "first"]


@dataclass(frozen=True)
class ECoFLaP:
    """keep_g = (1 - ceiling)·n_g + rest·c_g / Σc: the budget goes where the loss is steep (Sung et al. 2024).

    c_g sums the importance of a block's matrices. `zeroth`: |L(W + εZ) - L(W - εZ)| / 2ε with Gaussian Z, averaged over
    batches and draws, which is √(2/π)·‖∂L/∂W‖ on average; forward passes of the whole model only, two for every matrix,
    draw and batch. `first`: Σ|W|·mean|∂L/∂W| from the reverse walk, which costs four forward passes in all.

    A budget in weights means that of two blocks with equal scores the smaller one comes out denser. Meant for models of
    several towers, where local scores are on different scales; works for one as well.

    Attributes:
        order: `zeroth` as published, or `first`.
        ceiling: greatest sparsity of a block, from the target to 0.99; by default the target + 0.1.
        average: divide c_g by the number of the block's weights, as published for FLAN-T5.
        towers: `together` shares one budget, `apart` gives each tower the target.
        epsilon: step of a trial, above 0.
        draws: trials of a matrix on each batch, at least 1.
        samples: calibration samples that trials look at, at least 1.
        seed: of the noise, at least 0.
    """

    order: Order = "zeroth"
    ceiling: float | None = None
    average: bool = False
    towers: Literal["together", "apart"] = "together"
    epsilon: float = 1e-3
    draws: int = 1
    samples: int = 32
    seed: int = 0

    paper: ClassVar[str] = "Sung et al. 2024, arXiv:2310.02998"
    foreseeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check names and ranges.

        Raises:
            RecipeError: for an unknown word or a number out of range.
        """
        for field, value, known in (("order", self.order, Order), ("towers", self.towers, ("together", "apart"))):
            names = known if isinstance(known, tuple) else get_args(known)
            if value not in names:
                raise RecipeError(f"allocation.{field} is {value!r}.{near(value, names)}")
        if self.ceiling is not None and not 0 < self.ceiling <= 0.99:
            raise RecipeError(
                f"allocation.ceiling is {self.ceiling:g}; it must be in (0, 0.99] (target + 0.1 is usual)."
            )
        if not 0 < self.epsilon < 1:
            raise RecipeError(f"allocation.epsilon is {self.epsilon:g}; it must be in (0, 1) (the authors use 0.001).")
        for field, least in (("draws", 1), ("samples", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise RecipeError(f"allocation.{field} is {getattr(self, field)}; it must be at least {least}.")

    @property
    def needs(self) -> frozenset[type]:
        """Trials on the whole model, or gradients of the loss."""
        return frozenset({WholeModel if self.order == "zeroth" else LossGradientL1})

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity; all sites of a block share one.

        Raises:
            RecipeError: if the ceiling is below the target.
        """
        ceiling = min(sparsity + 0.1, 0.99) if self.ceiling is None else self.ceiling
        if ceiling < sparsity:
            raise RecipeError(
                f"allocation.ceiling is {ceiling:g}, below the wanted sparsity {sparsity:g}: no block may reach it. "
                f"Raise it to at least {sparsity:g}."
            )
        sizes = block_sizes(survey.sites)
        found = survey.measure(first_order, self.needs) if self.order == "first" else self._zeroth(survey)
        scores = {name: float(found[name].sum()) / (size if self.average else 1) for name, size in sizes.items()}
        blocks: dict[str, float] = {}
        for group in _groups(sizes, self.towers):
            blocks |= budget({name: scores[name] for name in group}, sizes, sparsity, ceiling)
        return {site.name: blocks[site.block] for site in survey.sites}

    def _zeroth(self, survey: Survey) -> dict[str, Tensor]:
        def trial(matrices: list[Matrix], losses: Losses) -> Tensor:
            return torch.stack([self._importance(matrix, losses) for matrix in matrices])

        return survey.trials(trial, self.samples)

    def _importance(self, matrix: Matrix, losses: Losses) -> Tensor:
        """Mean of |ĝ| over draws and batches, float64; the weights come back bit for bit."""
        before = matrix.weight.clone()
        total = torch.zeros((), dtype=torch.float64)
        try:
            for draw in range(self.draws):
                # The same noise for every matrix: what luck it brings, it brings to all.
                seed = self.seed * 1_000_003 + draw
                up, down = (_moved_loss(matrix, before, seed, step, losses) for step in (self.epsilon, -self.epsilon))
                total += ((up - down) / (2 * self.epsilon)).abs().mean()
        finally:
            matrix.weight.copy_(before)
        return total / self.draws


def first_order(matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
    """Σ_ij |W_ij|·mean over samples of |∂L/∂W_ij| of each matrix, float64."""
    values = [
        (matrix.weight.float().abs() * stats[matrix.name][LossGradientL1].mean).sum(dtype=torch.float64)
        for matrix in matrices
    ]
    return torch.stack(values).cpu()


def budget(scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, ceiling: float) -> dict[str, float]:
    """Block -> sparsity: ⌊Σ n·(1 - sparsity)⌋ weights stay, each block between (1 - ceiling)·n_g and n_g of them.

    What is above the least is divided in proportion to the scores; what a full block cannot take goes to the others.
    Without any score the weights are divided evenly, and prunus warns.
    """
    size = np.array([sizes[name] for name in scores], dtype=np.int64)
    score = np.array([scores[name] for name in scores], dtype=np.float64)
    if not np.isfinite(score).all() or score.sum() <= 0:
        _LOG.warning("No block's importance could be told apart (all are 0 or not finite): the sparsity is uniform.")
        score = size.astype(np.float64)
        ceiling = sparsity
    keep = math.floor(float(size.sum()) * (1 - sparsity) + 1e-6)
    kept = size * (1 - ceiling)
    rest = keep - kept.sum()
    free = np.ones(len(size), dtype=bool)
    while rest > 1e-9 and free.any():
        weights = np.where(free, score, 0.0)
        weights = weights if weights.sum() > 0 else np.where(free, size - kept, 0.0)
        wanted = kept + rest * weights / weights.sum()
        full = free & (wanted >= size)
        kept = np.where(full, size, kept if full.any() else wanted)
        rest = keep - kept.sum() if full.any() else 0.0
        free &= ~full
    whole = _whole(kept, size, keep)
    return {name: share(int(n - k), int(n)) for name, n, k in zip(scores, size, whole, strict=True)}


def _whole(kept: np.ndarray, size: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near `kept` with this total, none above its size: the largest fractions are rounded up."""
    whole = np.minimum(np.floor(kept + 1e-9).astype(np.int64), size)
    missing = total - int(whole.sum())
    step = 1 if missing > 0 else -1
    while missing:
        for place in np.argsort(step * (whole - kept), kind="stable").tolist():
            if missing and 0 <= whole[place] + step <= size[place]:
                whole[place] += step
                missing -= step
    return whole


def _groups(sizes: Mapping[str, int], towers: str) -> list[list[str]]:
    """Blocks that share a budget."""
    if towers == "together":
        return [list(sizes)]
    apart: dict[str, list[str]] = {}
    for name in sizes:
        apart.setdefault(name.rpartition(".")[0], []).append(name)
    return list(apart.values())


def _moved_loss(matrix: Matrix, before: Tensor, seed: int, step: float, losses: Losses) -> Tensor:
    """The losses at W + step·Z, Z ~ N(0, 1) of this seed, in the dtype of the weight."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // before.shape[1])
    for start in range(0, len(before), rows):
        part = before[start : start + rows]
        noise = torch.randn(part.shape, generator=generator).to(part)
        matrix.weight[start : start + rows] = part + step * noise
    return losses()
