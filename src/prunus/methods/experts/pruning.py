"""Experts go: the same number from every mixture, so that stock classes load the result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.edits import Narrow
from prunus.errors import RecipeError
from prunus.methods.experts.scores import ExpertScore, RouterWeighted
from prunus.methods.experts.seen import watch
from prunus.methods.shape import Blocks, Plan
from prunus.models.pool import closed, parts
from prunus.sites import Block, Kind, Pool, SiteInfo
from prunus.statistics import BlockStates, SiteStats
from prunus.stream import Step

# Subsets that the exhaustive search tries in a mixture, at most: C(16, 8).
SUBSETS = math.comb(16, 8)


@dataclass(frozen=True)
class Ranked:
    """The experts of lowest score go. Where a router chooses among groups first, the same number from each.

    Attributes:
        score: what an expert is worth.
        paper: where it was published.
    """

    score: ExpertScore = field(default_factory=RouterWeighted)
    paper: str = ""

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Experts."""
        return ("experts",)

    @property
    def needs(self) -> frozenset[type]:
        """Text: mixtures are looked at as they run."""
        return frozenset({BlockStates})

    @property
    def gathers(self) -> frozenset[type]:
        """Nothing after the plan."""
        return frozenset()

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do."""

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """Masks of all mixtures.

        Raises:
            RecipeError: so many experts cannot go.
        """
        left = counts(survey, sparsity)

        def visit(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
            values = [self.score(seen) for seen in watch(step).values()]
            return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)

        found = survey.visit(visit, self.needs)
        keep = {}
        for block in survey.blocks:
            scores = found[block.name].split([pool.groups for pool in block.pools])
            for pool, own in zip(block.pools, scores, strict=True):
                keep[pool.name] = best(own, left[pool.name], pool.spans)
        return Plan(keep=keep)

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Narrow]:
        """One edit for each mixture that loses an expert."""
        return edits(block, plan)


@dataclass(frozen=True)
class Exhaustive:
    """Of all subsets of experts, that stays whose mixture differs least from the dense one: argmin Σ ‖Z − Z_D‖_F.

    The sum is over calibration batches (Lu et al. 2024, §3.2; the layer-wise form). For mixtures of up to 16 experts.

    Attributes:
        tokens: calibration tokens on which the subsets of a mixture are compared, at least 1.
        paper: where it was published.
    """

    tokens: int = 4096
    paper: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: no tokens.
        """
        if self.tokens < 1:
            raise RecipeError(f"method.tokens is {self.tokens}; it must be at least 1.")

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Experts."""
        return ("experts",)

    @property
    def needs(self) -> frozenset[type]:
        """Text: mixtures are looked at as they run."""
        return frozenset({BlockStates})

    @property
    def gathers(self) -> frozenset[type]:
        """Nothing after the plan."""
        return frozenset()

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do."""

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """Masks of all mixtures.

        Raises:
            RecipeError: so many experts cannot go, there are too many subsets to try, or several processes.
        """
        left = counts(survey, sparsity)
        for block in survey.blocks:
            for pool in block.pools:
                tries = math.comb(pool.groups, left[pool.name])
                if tries > SUBSETS:
                    raise RecipeError(
                        f"{pool.name} has {tries:,} subsets of {left[pool.name]} of {pool.groups} experts, too many to "
                        "try all. Use --method reap, or remove fewer."
                    )

        def visit(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
            if step.processes.world > 1:
                raise RecipeError("Subsets of experts are tried by one process; start one.")
            found = watch(step, keep=True)
            masks = [
                search(distance(step.block, pool, self._first(found[pool.name].inputs)), pool, left[pool.name])
                for pool in step.block.pools
            ]
            return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)

        masks = survey.visit(visit, self.needs)
        keep = {}
        for block in survey.blocks:
            own = masks[block.name].split([pool.groups for pool in block.pools])
            keep |= {pool.name: mask.bool() for pool, mask in zip(block.pools, own, strict=True)}
        return Plan(keep=keep)

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Narrow]:
        """One edit for each mixture that loses an expert."""
        return edits(block, plan)

    def _first(self, inputs: list[Tensor]) -> list[Tensor]:
        """So many batches that they hold the wanted tokens."""
        total = list(itertools.accumulate(batch.shape[:-1].numel() for batch in inputs))
        wanted = next((number for number, have in enumerate(total, start=1) if have >= self.tokens), len(inputs))
        return inputs[:wanted]


def counts(survey: Blocks, sparsity: float) -> dict[str, int]:
    """Mixture -> how many of its experts stay: the same share of each, so that the matrices of blocks lose `sparsity`.

    Raises:
        RecipeError: fewer experts than the router picks would be left.
    """
    pools = [pool for block in survey.blocks for pool in block.pools]
    size = sum(info.size for block in survey.blocks for info in block.infos)
    inside = sum(int(pool.weights.sum()) for pool in pools)
    share = sparsity * size / inside
    left, most = {}, 0
    for pool in pools:
        spare = pool.groups - pool.least
        most += spare * int(pool.weights[0])
        gone = round(share * pool.groups / pool.spans) * pool.spans
        if gone > spare:
            reach = sum((one.groups - one.least) * int(one.weights[0]) for one in pools) / size
            raise RecipeError(
                f"{pool.name}: {gone} of {pool.groups} experts would go, and its router needs {pool.least}: ask for a "
                f"sparsity of 0 to {int(1000 * reach) / 1000:g}."
            )
        left[pool.name] = pool.groups - gone
    return left


def best(scores: Tensor, left: int, spans: int) -> Tensor:
    """Bool `[experts]`, True for the `left` highest scores, equally many of each group; ties go to the first."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    size = len(scores) // spans
    for span in range(spans):
        own = scores[span * size : (span + 1) * size]
        order = own.argsort(descending=True, stable=True)[: left // spans]
        keep[span * size + order] = True
    return keep


def distance(block: Block, pool: Pool, inputs: list[Tensor]) -> Callable[[Tensor], float]:
    """A function of a mask: how far the mixture with only these experts is from the dense one, Σ ‖Z − Z_D‖_F."""
    mixture = parts(block, pool)[2]
    with torch.no_grad():
        dense = [_output(mixture(batch)) for batch in inputs]

    @torch.no_grad()
    def measure(keep: Tensor) -> float:
        with closed(block, pool, keep):
            # float64: subsets may differ by little.
            return sum(
                float((_output(mixture(batch)).double() - own.double()).norm())
                for batch, own in zip(inputs, dense, strict=True)
            )

    return measure


def search(measure: Callable[[Tensor], float], pool: Pool, left: int) -> Tensor:
    """The subset of `left` experts of smallest distance, of all; the first of equals."""
    size, each = pool.groups // pool.spans, left // pool.spans
    best_mask, least = torch.ones(pool.groups, dtype=torch.bool), math.inf
    if left == pool.groups:
        return best_mask
    for chosen in itertools.product(*(itertools.combinations(range(size), each) for _ in range(pool.spans))):
        keep = torch.zeros(pool.groups, dtype=torch.bool)
        for span, members in enumerate(chosen):
            keep[[span * size + member for member in members]] = True
        found = measure(keep)
        if found < least:
            best_mask, least = keep, found
    return best_mask


def edits(block: Block, plan: Plan) -> list[Narrow]:
    """One edit for each mixture of a block that loses an expert."""
    masks = [(pool.name, plan.keep[pool.name]) for pool in block.pools]
    return [Narrow(name, keep) for name, keep in masks if not bool(keep.all())]


def _output(result: Tensor | tuple) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
