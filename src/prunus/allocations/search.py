"""An allocation found by measuring."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.errors import RecipeError, near
from prunus.patterns.selection import count, keep_highest, share
from prunus.sites import Matrix
from prunus.statistics import InputNorm, SiteStats
from prunus.trials import Losses, WholeModelTwice
from prunus.updates.keep import zeroed

Level = Literal["block", "matrix"]
HIGHEST = 0.99


@dataclass(frozen=True)
class Search:
    """The best budget of those tried: weights move between two groups at a time, and what lowers the loss stays.

    Evolutionary search as in EvoPress (Sieberling et al. 2025, arXiv:2410.14649): each generation makes `offspring`
    budgets by one to three moves of the present best; all are judged on one batch, the best of them on all; it replaces
    its parent only if the loss on all is lower, so the result is never worse than the start on this objective. Judged
    is the loss of the model under Wanda's masks from the dense model's inputs, on the last `samples` of the calibration
    text; what the recipe's own metric and update then make of the budget is not tried.

    Attributes:
        start: the allocation that is improved, by name, with its own defaults.
        level: what competes: `block`, or each `matrix`.
        minutes: when to stop, above 0. The result then depends on the machine; set `trials` for one that does not.
        trials: when to stop at the latest, measured losses of all batches, at least 1.
        step: largest change of a group's sparsity in one move, in (0, 0.5].
        offspring: budgets in a generation, at least 1.
        samples: calibration samples that the loss is of, at least 1.
        seed: of the moves, at least 0.
    """

    start: str = "uniform"
    level: Level = "block"
    minutes: float = 30.0
    trials: int = 1000
    step: float = 0.04
    offspring: int = 4
    samples: int = 16
    seed: int = 0

    paper: ClassVar[str] = "Sieberling et al. 2025, arXiv:2410.14649"
    foreseeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check names and ranges.

        Raises:
            RecipeError: for an unknown word or a number out of range.
        """
        if self.level not in get_args(Level):
            raise RecipeError(f"allocation.level is {self.level!r}.{near(self.level, get_args(Level))}")
        if not self.minutes > 0:
            raise RecipeError(f"allocation.minutes is {self.minutes:g}; it must be above 0.")
        if not 0 < self.step <= 0.5:
            raise RecipeError(f"allocation.step is {self.step:g}; it must be in (0, 0.5].")
        for field, least in (("trials", 1), ("offspring", 1), ("samples", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise RecipeError(f"allocation.{field} is {getattr(self, field)}; it must be at least {least}.")

    @property
    def needs(self) -> frozenset[type]:
        """Trials on the whole model, input norms for the masks, and what the start needs."""
        return frozenset({WholeModelTwice, InputNorm}) | self._start().needs

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity.

        Raises:
            RecipeError: if `start` is no allocation.
        """
        begun = self._start().divide(survey, sparsity)
        norms = survey.measure(_norms, frozenset({InputNorm}))
        sizes = {site.name: site.size for site in survey.sites}
        groups = [[site.name] for site in survey.sites]
        if self.level == "block":
            blocks: dict[str, list[str]] = {}
            for site in survey.sites:
                blocks.setdefault(site.block, []).append(site.name)
            groups = list(blocks.values())
        with survey.whole(self.samples) as (matrices, losses):
            masked = Masked(matrices, norms)
            return self._improve(begun, groups, sizes, masked, losses, survey)

    def _start(self) -> Any:
        from prunus.allocations import ALLOCATIONS

        if self.start == "search" or self.start not in ALLOCATIONS:
            raise RecipeError(f"allocation.start is {self.start!r}.{near(self.start, set(ALLOCATIONS) - {'search'})}")
        return ALLOCATIONS[self.start]

    def _improve(
        self, budget: dict[str, float], groups: list[list[str]], sizes: Mapping[str, int], masked: Masked,
        losses: Losses, survey: Survey,
    ) -> dict[str, float]:  # fmt: skip
        """The search itself; its state is kept after each generation."""
        fresh: dict[str, Any] = {"budget": budget, "generation": 0, "trials": 1, "minutes": 0.0}
        state: dict[str, Any] = survey.recall("search") or fresh | {"loss": masked.loss(budget, losses)}
        survey.progress.stage("search, minutes", math.ceil(self.minutes - state["minutes"]))
        while state["trials"] < self.trials and state["minutes"] < self.minutes:
            begun = time.monotonic()
            draw = random.Random(f"{self.seed} {state['generation']}")
            tried = [self._moved(state["budget"], groups, sizes, draw) for _ in range(self.offspring)]
            found = [(masked.loss(one, losses, batches=1), number) for number, one in enumerate(tried)]
            best = tried[min(found)[1]]
            loss = masked.loss(best, losses)
            if loss < state["loss"]:
                state |= {"budget": best, "loss": loss}
            state |= {"generation": state["generation"] + 1, "trials": state["trials"] + 1}
            before, state["minutes"] = state["minutes"], state["minutes"] + (time.monotonic() - begun) / 60
            state = survey.remember("search", state)
            for _ in range(int(before), int(min(state["minutes"], self.minutes))):
                survey.progress.advance(f"{state['trials']} trials, loss {state['loss']:.4f}")
        return dict(state["budget"])

    def _moved(
        self, budget: Mapping[str, float], groups: list[list[str]], sizes: Mapping[str, int], draw: random.Random
    ) -> dict[str, float]:
        """A budget of the same total, a few of its weights moved from one group to another."""
        moved = dict(budget)
        if len(groups) < 2:
            return moved
        for _ in range(draw.randint(1, 3)):
            give, take = draw.sample(groups, 2)
            room = min(sum(_room(moved, give, sizes, up=False)), sum(_room(moved, take, sizes, up=True)))
            most = self.step * min(sum(sizes[name] for name in group) for group in (give, take))
            weights = int(draw.random() * min(most, room))
            _spread(moved, give, sizes, -weights)
            _spread(moved, take, sizes, weights)
        return moved


def _room(budget: Mapping[str, float], group: list[str], sizes: Mapping[str, int], up: bool) -> list[int]:
    """How many weights each matrix of a group may still lose, or get back."""
    lost = [count(sizes[name], budget[name]) for name in group]
    if not up:
        return lost
    return [max(int(HIGHEST * sizes[name]) - gone, 0) for name, gone in zip(group, lost, strict=True)]


def _spread(budget: dict[str, float], group: list[str], sizes: Mapping[str, int], weights: int) -> None:
    """Change a group's matrices by so many weights in all, each in proportion to its room."""
    room = _room(budget, group, sizes, up=weights > 0)
    left, whole = abs(weights), sum(room)
    for name, own in zip(group, room, strict=True):
        part = min(own, -(-left * own // whole)) if whole else 0
        part = min(part, left)
        whole, left = whole - own, left - part
        lost = count(sizes[name], budget[name]) + (part if weights > 0 else -part)
        budget[name] = share(lost, sizes[name])


class Masked:
    """The dense model in memory under masks that change: Wanda's, from the inputs of the dense model."""

    def __init__(self, blocks: Mapping[str, list[Matrix]], norms: Mapping[str, Tensor]):
        """Keep a dense copy of every matrix; `norms` holds those of a block's matrices, one behind the other."""
        self.matrices = {matrix.name: matrix for matrices in blocks.values() for matrix in matrices}
        self.dense = {name: matrix.weight.clone() for name, matrix in self.matrices.items()}
        self.norms: dict[str, Tensor] = {}
        self.budget: dict[str, float] = {}
        for block, matrices in blocks.items():
            parts = norms[block].split([matrix.weight.shape[1] for matrix in matrices])
            self.norms |= {matrix.name: part for matrix, part in zip(matrices, parts, strict=True)}

    def loss(self, budget: Mapping[str, float], losses: Losses, batches: int | None = None) -> float:
        """Mean loss under this budget, over all batches or the first few."""
        self.apply(budget)
        return float(losses(batches).mean())

    def apply(self, budget: Mapping[str, float]) -> None:
        """Mask what the budget changes."""
        for name, sparsity in budget.items():
            if self.budget.get(name) != sparsity:
                dense = self.dense[name]
                scores = dense.float().abs() * self.norms[name].to(dense.device)
                mask = keep_highest(scores, count(dense.shape[1], sparsity))
                self.matrices[name].weight.copy_(zeroed(dense, mask))
        self.budget = dict(budget)


def _norms(matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
    """Input norms of a block's matrices, one behind the other, float32; 1 where no token came by."""
    parts = [
        torch.ones(matrix.weight.shape[1]) if stats[matrix.name].unseen else stats[matrix.name][InputNorm].norm.cpu()
        for matrix in matrices
    ]
    return torch.cat(parts)
