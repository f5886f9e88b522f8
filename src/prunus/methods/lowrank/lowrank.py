"""A matrix becomes two thin ones: SVD, and SVD that knows the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunus.edits import Split
from prunus.errors import ModelError, RecipeError
from prunus.evidence import of_inputs
from prunus.methods.lowrank.ranks import reachable, uniform, water_filled
from prunus.methods.lowrank.scores import Plain, Worth
from prunus.methods.lowrank.truncate import spectrum, truncate
from prunus.methods.shape import Blocks, Plan
from prunus.sites import Block, Kind, Matrix, SiteInfo
from prunus.statistics import SiteStats
from prunus.stream import Step


@dataclass(frozen=True)
class LowRank:
    """W `[out, in]` ≈ B·A, B `[out, r]` and A `[r, in]`: the best product of rank r under the score's error.

    A pays where r·(out + in) < out·in: a square matrix must lose half of its rank before it loses a weight. Matrices
    for which that costs too much stay whole, and others go further.

    Attributes:
        score: what an error is worth.
        ranks: `global`: ranks are chosen over all matrices together, where a removed weight costs least of the
            matrices' relative errors; `uniform`: every matrix loses the same share of its weights.
        first: blocks at the beginning that are left alone, at least 0.
        last: blocks at the end that are left alone, at least 0.
        round_to: ranks are multiples of this, at least 1; kernels like 8, 16 or 32.
        paper: where it was published.
    """

    score: Worth = field(default_factory=Plain)
    ranks: Literal["global", "uniform"] = "global"
    first: int = 0
    last: int = 0
    round_to: int = 1
    paper: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is too small.
        """
        for name, least in (("first", 0), ("last", 0), ("round_to", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"method.{name} is {getattr(self, name)}; it must be at least {least}.")

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Ranks."""
        return ("ranks",)

    @property
    def needs(self) -> frozenset[type]:
        """Statistics of its score."""
        return self.score.needs

    @property
    def gathers(self) -> frozenset[type]:
        """The same: each block is split as it runs behind those already split."""
        return self.score.needs

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do; which can be split is found by trying."""

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """The rank of every matrix that is split.

        Raises:
            RecipeError: the sparsity cannot be reached, or no block is left to work on.
        """
        chosen = survey.blocks[self.first : max(self.first, len(survey.blocks) - self.last)]
        infos = [info for block in chosen for info in block.infos if info.name in block.thin]
        if not infos:
            raise RecipeError(
                f"No matrix is left to split: the model has {len(survey.blocks)} blocks, and the first {self.first} "
                f"and last {self.last} are left alone."
            )
        size = sum(info.size for block in survey.blocks for info in block.infos)
        target = math.ceil(sparsity * size - 1e-6)  # at least the asked share goes
        reachable(infos, self.round_to, target)
        if self.ranks == "uniform" or not target:
            return Plan(ranks=uniform(infos, self.round_to, target))
        return Plan(ranks=water_filled(infos, self._losses(survey, infos), self.round_to, target))

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Split]:
        """One edit for each matrix of the plan."""
        edits = []
        for matrix in block.matrices():
            if matrix.name in plan.ranks:
                moment = self.score(stats[matrix.name]) if self.needs else None
                edits.append(Split(matrix.name, *truncate(_finite(matrix), moment, plan.ranks[matrix.name])))
        return edits

    def _losses(self, survey: Blocks, infos: list[SiteInfo]) -> dict[str, Tensor]:
        """Matrix -> share of its weighted square that each rank would lose, on the dense model."""

        def visit(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
            found = [
                _lost(spectrum(_finite(matrix), self.score(stats[matrix.name]) if self.needs else None))
                for matrix in step.block.matrices()
                if matrix.name in wanted
            ]
            return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64)

        wanted = {info.name for info in infos}
        found = survey.visit(visit, self.needs, text=bool(of_inputs(self.needs)))
        result = {}
        for block in survey.blocks:
            own = [info for info in block.infos if info.name in wanted]
            parts = found[block.name].split([min(info.shape) + 1 for info in own]) if own else ()
            result |= {info.name: part for info, part in zip(own, parts, strict=True)}
        return result


def _lost(squares: Tensor) -> Tensor:
    """`[k + 1]`: the share of the sum of `squares [k]` that ranks 0 to k lose; zeros for a matrix of zeros."""
    left = squares.flip(0).cumsum(0).flip(0)
    lost = torch.cat([left, left.new_zeros(1)])
    return lost / lost[0] if float(lost[0]) > 0 else torch.zeros_like(lost)


def _finite(matrix: Matrix) -> Tensor:
    if not bool(torch.stack(matrix.weight.aminmax()).isfinite().all()):
        raise ModelError(f"{matrix.name} holds NaN or infinite weights. Repair the checkpoint, or ignore the site.")
    return matrix.weight
