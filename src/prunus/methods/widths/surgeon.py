"""Groups go that their consumer can best do without once its other columns are refitted (`obs-sp`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prunus.edits import Narrow
from prunus.errors import RecipeError
from prunus.factor import check_damp
from prunus.methods.shape import Blocks, Plan
from prunus.methods.widths.elimination import eliminate, refit
from prunus.methods.widths.structures import adaptive, check_even, chosen, reachable, to_multiple, uniform_counts
from prunus.sites import Block, Kind, Matrix, SiteInfo, Width
from prunus.statistics import Gram, SiteStats
from prunus.stream import Step


@dataclass(frozen=True)
class Surgeon:
    """Structured optimal brain surgeon, block after block, each on the outputs of those already pruned.

    Attributes:
        structure: `adaptive`: one price of a weight for all blocks, the error as a share of the block's output;
            `uniform`: every block gets the same shape, which loads everywhere.
        damp: added to the diagonal of the Hessian, as a share of its mean, in [0, 1].
        rounds: the removal of a whole width is cut into so many rounds, at least 1.
        kinds: `both`, `heads` or `neurons`.
        first: blocks at the beginning that are left alone, at least 0.
        last: blocks at the end that are left alone, at least 0.
        round_to: neurons that stay, in multiples of this, at least 1; the share that this reaches is reported.
        paper: where it was published.
    """

    structure: Literal["adaptive", "uniform"] = "adaptive"
    damp: float = 0.01
    rounds: int = 128
    kinds: Literal["both", "heads", "neurons"] = "both"
    first: int = 0
    last: int = 0
    round_to: int = 1
    paper: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is out of range.
        """
        check_damp("method.damp", self.damp)
        for name, lowest in (("rounds", 1), ("round_to", 1), ("first", 0), ("last", 0)):
            if getattr(self, name) < lowest:
                raise RecipeError(f"method.{name} is {getattr(self, name)}; it must be at least {lowest}.")

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Kinds of widths that it narrows."""
        return ("heads", "neurons") if self.kinds == "both" else (self.kinds,)

    @property
    def needs(self) -> frozenset[type]:
        """The Hessian of the consumers' inputs."""
        return frozenset({Gram})

    @property
    def gathers(self) -> frozenset[type]:
        """The Hessian, of the pruned inputs."""
        return frozenset({Gram})

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do."""

    @property
    def bias(self) -> bool:
        """It makes none."""
        return False

    def even(self) -> Surgeon:
        """See `prunus.methods.shape.Uneven`."""
        check_even(self)
        return replace(self, structure="uniform")

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """How many groups of each width stay.

        Raises:
            RecipeError: the sparsity cannot be reached with these widths.
        """
        widths = chosen(survey, self)
        target = reachable(survey, widths, sparsity, self)
        if self.structure == "uniform":
            share = target / sum(int(width.weights.sum()) for width in widths)
            counts = uniform_counts(widths, target, share, 0, "UL-UM", "exact", survey.refusal)
            return self._plan(widths, counts)
        found = survey.visit(self._prices, self.needs)
        prices: dict[str, Tensor] = {}
        for block in survey.blocks:
            parts = found[block.name].split([width.groups for width in block.widths])
            prices |= {width.name: part for width, part in zip(block.widths, parts, strict=True)}
        keep = adaptive(widths, prices, target, None, "exact")
        return self._plan(widths, {name: int(mask.sum()) for name, mask in keep.items()})

    def _plan(self, widths: list[Width], counts: Mapping[str, int]) -> Plan:
        return Plan(count={width.name: to_multiple(width, counts[width.name], self.round_to) for width in widths})

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
            found = eliminate(weight, hessian, self._groups(width, weight), width.groups - count, self.rounds)
            keep = torch.ones(width.groups, dtype=torch.bool)
            keep[found.order] = False
            fitted = refit(weight, hessian, width.consumer.kept(keep).to(weight.device))
            edits.append(Narrow(width.name, keep, weights={name: fitted}))
        return edits

    def _prices(self, step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
        """Float64, of each group of each width: what its removal costs for each of its weights, in its turn."""
        matrices = {matrix.name: matrix for matrix in step.block.matrices()}
        # Errors of different blocks compare as shares of what the block puts out; float64 sums.
        energy = torch.tensor([sum(float(out.float().square().sum()) for out in step.dense[:-1])], dtype=torch.float64)
        step.processes.add_up([energy])
        parts = [self._price(width, matrices[width.consumer.matrix], stats) / energy for width in step.block.widths]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def _price(self, width: Width, matrix: Matrix, stats: Mapping[str, SiteStats]) -> Tensor:
        hessian, weight = self._hessian(stats[matrix.name]), matrix.weight
        found = eliminate(weight, hessian, self._groups(width, weight), width.groups, self.rounds)
        prices = torch.zeros(width.groups, dtype=torch.float64)
        # A group that went later is worth no less than one that went before it.
        prices[found.order] = (found.losses / width.weights[found.order]).cummax(0).values
        return prices

    def _hessian(self, stats: SiteStats) -> Tensor:
        """Damped, float64 `[in, in]`; inputs that never fire get a one.

        Raises:
            RecipeError: it is not positive definite.
        """
        hessian = stats[Gram].hessian.double()
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal.add_(self.damp * diagonal.mean())
        diagonal[dead] = 1.0
        if int(torch.linalg.cholesky_ex(hessian).info):
            raise RecipeError(
                f"{stats.site}: the Hessian is not positive definite with method.damp {self.damp:g}. Ask for more with "
                f"--set method.damp={max(10 * self.damp, 0.01):g}, or use more calibration samples."
            )
        return hessian

    def _groups(self, width: Width, weight: Tensor) -> Tensor:
        return width.consumer.groups.to(weight.device)
