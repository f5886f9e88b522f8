"""Groups go that their consumer can best do without once its other columns are refitted (`obs-sp`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.edits import Narrow
from prunus.errors import RecipeError
from prunus.factor import check_damp
from prunus.gradients import LossGradientL2
from prunus.methods.shape import Blocks, Plan
from prunus.methods.widths.elimination import eliminate, refit
from prunus.methods.widths.structures import adaptive, reachable, uniform_counts
from prunus.sites import Block, Kind, Matrix, SiteInfo, Width
from prunus.statistics import Gram, SiteStats
from prunus.stream import Step


@dataclass(frozen=True)
class Surgeon:
    """Structured optimal brain surgeon, block after block, each on the outputs of those already pruned.

    Attributes:
        structure: `adaptive`: one price of a weight for all blocks; `uniform`: every block gets the same shape, which
            loads everywhere.
        weigh: what an output error counts when blocks are compared: `loss` (the squared gradient of the loss at that
            output, estimated from the gradients of the consumer), or `output` (the size of the block's output).
        damp: added to the diagonal of the Hessian, as a share of its mean, in [0, 1].
        rounds: the removal of a whole width is cut into so many rounds, at least 1.
        kinds: `both`, `heads` or `neurons`.
        first: blocks at the beginning that are left alone, at least 0.
        last: blocks at the end that are left alone, at least 0.
        paper: where it was published.
    """

    structure: Literal["adaptive", "uniform"] = "adaptive"
    weigh: Literal["loss", "output"] = "loss"
    damp: float = 0.01
    rounds: int = 128
    kinds: Literal["both", "heads", "neurons"] = "both"
    first: int = 0
    last: int = 0
    paper: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is out of range.
        """
        check_damp("method.damp", self.damp)
        for name, lowest in (("rounds", 1), ("first", 0), ("last", 0)):
            if getattr(self, name) < lowest:
                raise RecipeError(f"method.{name} is {getattr(self, name)}; it must be at least {lowest}.")

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Kinds of widths that it narrows."""
        return ("heads", "neurons") if self.kinds == "both" else (self.kinds,)

    @property
    def needs(self) -> frozenset[type]:
        """The Hessian of the consumers' inputs, and gradients where they weigh the errors."""
        return self.gathers | (self._weighs if self.structure == "adaptive" else frozenset())

    @property
    def gathers(self) -> frozenset[type]:
        """The Hessian, of the pruned inputs."""
        return frozenset({Gram})

    @property
    def _weighs(self) -> frozenset[type]:
        return frozenset({LossGradientL2}) if self.weigh == "loss" else frozenset()

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do."""

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """How many groups of each width stay.

        Raises:
            RecipeError: the sparsity cannot be reached with these widths.
        """
        chosen = survey.blocks[self.first : len(survey.blocks) - self.last]
        widths = [width for block in chosen for width in block.widths]
        target = reachable(survey, widths, sparsity, self)
        if self.structure == "uniform":
            return Plan(count=uniform_counts(widths, target, sparsity, 0, "UL-UM", "exact"))
        found = survey.visit(self._prices, self.needs)
        prices: dict[str, Tensor] = {}
        for block in survey.blocks:
            parts = found[block.name].split([width.groups for width in block.widths])
            prices |= {width.name: part for width, part in zip(block.widths, parts, strict=True)}
        keep = adaptive(widths, prices, target, None, "exact")
        return Plan(count={name: int(mask.sum()) for name, mask in keep.items()})

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Narrow]:
        """One edit for each width that loses a group, its consumer refitted."""
        matrices = {matrix.name: matrix for matrix in block.matrices()}
        edits = []
        for width in block.widths:
            count = plan.count.get(width.name, width.groups)
            if count == width.groups:
                continue
            name = width.consumer.matrix
            weight, hessian = matrices[name].weight, self._hessian(stats[name])
            # Which columns go is a matter of this block alone, where all outputs count alike.
            ones = torch.ones(len(weight), device=weight.device)
            found = eliminate(weight, hessian, self._groups(width, weight), ones, width.groups - count, self.rounds)
            keep = torch.ones(width.groups, dtype=torch.bool)
            keep[found.order] = False
            fitted = refit(weight, hessian, width.consumer.kept(keep).to(weight.device))
            edits.append(Narrow(width.name, keep, weights={name: fitted}))
        return edits

    def _prices(self, step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
        """Float64, of each group of each width: what its removal costs for each of its weights, in its turn."""
        matrices = {matrix.name: matrix for matrix in step.block.matrices()}
        scale = 1.0
        if self.weigh == "output":
            energy = torch.tensor([sum(float(out.float().square().sum()) for out in step.dense[:-1])])
            step.processes.add_up([energy])
            scale = 1 / float(energy)
        parts = [scale * self._price(width, matrices[width.consumer.matrix], stats) for width in step.block.widths]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def _price(self, width: Width, matrix: Matrix, stats: Mapping[str, SiteStats]) -> Tensor:
        known = stats[matrix.name]
        hessian, weight = self._hessian(known), matrix.weight
        rows = torch.ones(len(weight), device=weight.device)
        if self.weigh == "loss":
            gradient = known[LossGradientL2].mean.square()
            rows = gradient.sum(1) / hessian.diagonal().sum() * len(weight[0])
        found = eliminate(weight, hessian, self._groups(width, weight), rows, width.groups, self.rounds)
        prices = torch.zeros(width.groups, dtype=torch.float64)
        # A group that went later is worth no less than one that went before it.
        prices[found.order] = (found.losses / width.weights[found.order]).cummax(0).values
        return prices

    def _hessian(self, stats: SiteStats) -> Tensor:
        """Damped, `[in, in]`; inputs that never fire get a one."""
        hessian = stats[Gram].hessian.double()
        diagonal = hessian.diagonal()
        damping = self.damp * diagonal.mean()
        diagonal.add_(damping if float(damping) > 0 else 1.0)
        return hessian

    def _groups(self, width: Width, weight: Tensor) -> Tensor:
        return width.consumer.groups.to(weight.device)
