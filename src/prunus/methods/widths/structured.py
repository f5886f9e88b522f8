"""Score x structure x compensation: FLAP, Wanda-sp, magnitude-sp and LLM-Pruner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from prunus.edits import Narrow
from prunus.errors import RecipeError
from prunus.evidence import of_inputs
from prunus.methods.shape import Blocks, Plan
from prunus.methods.widths.scores import Fluctuation, Score
from prunus.methods.widths.structures import (
    Structure,
    adaptive,
    check_even,
    check_heads,
    chosen,
    grouped,
    highest,
    reachable,
    to_multiple,
    uniform,
    uniform_counts,
)
from prunus.sites import Block, Kind, SiteInfo, Width
from prunus.statistics import InputMoments, SiteStats
from prunus.stream import Step


@dataclass(frozen=True)
class Structured:
    """Groups of heads and neurons go by a score of their channels.

    Attributes:
        score: what a channel is worth.
        structure: `AL-AM` (one threshold over all blocks, heads and neurons priced by their weights), `AL-MM` (so many
            heads, then neurons, each over all blocks), `UL-UM` (the same share of every block), `UL-MM` (the same
            number of heads in every block, then neurons) or `local` (as `UL-UM`, with LLM-Pruner's rounding). UL and
            local give every block the same shape, which loads everywhere.
        bias: add what the removed channels contributed on average to the bias of the matrix that reads them.
        sequential: score each block on the outputs of the blocks already pruned, not on those of the dense model.
        kinds: `both`, `heads` or `neurons`.
        heads: with an MM structure, how many groups of heads go in the whole model; 0 for none.
        first: blocks at the beginning that are left alone, at least 0.
        last: blocks at the end that are left alone, at least 0.
        round_to: neurons that stay, in multiples of this, at least 1; the share that this reaches is reported.
        compat: `reference`: the published code's counts, which miss the asked share by a little or a lot.
        paper: where it was published.
    """

    score: Score = field(default_factory=Fluctuation)
    structure: Structure = "AL-AM"
    bias: bool = False
    sequential: bool = False
    kinds: Literal["both", "heads", "neurons"] = "both"
    heads: int = 0
    first: int = 0
    last: int = 0
    round_to: int = 1
    compat: Literal["exact", "reference"] = "exact"
    paper: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is below 0, or a setting has no meaning in this combination.
        """
        for name in ("heads", "first", "last"):
            if getattr(self, name) < 0:
                raise RecipeError(f"method.{name} is {getattr(self, name)}; it must be at least 0.")
        if self.round_to < 1:
            raise RecipeError(f"method.round_to is {self.round_to}; it must be at least 1.")
        if self.heads and not self.structure.endswith("MM"):
            raise RecipeError(f"method.heads means something to UL-MM and AL-MM only, not to {self.structure}.")

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Kinds of widths that it narrows."""
        return ("heads", "neurons") if self.kinds == "both" else (self.kinds,)

    @property
    def needs(self) -> frozenset[type]:
        """Statistics of its score, and means for a bias."""
        return self.score.needs | (frozenset({InputMoments}) if self.bias else frozenset())

    @property
    def gathers(self) -> frozenset[type]:
        """The same, if blocks are scored one after the other."""
        return self.needs if self.sequential else frozenset()

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do: shapes are no matter of a pattern."""

    def even(self) -> Structured:
        """See `prunus.methods.shape.Uneven`."""
        check_even(self)
        alike: dict[Structure, Structure] = {"AL-AM": "UL-UM", "AL-MM": "UL-MM"}
        return replace(self, structure=alike.get(self.structure, self.structure))

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """Masks of all widths, or for sequential uniform cuts only their counts.

        Raises:
            RecipeError: the sparsity cannot be reached with these widths.
        """
        widths = chosen(survey, self)
        alike, published = not self.structure.startswith("AL"), self.compat == "reference"
        target = reachable(survey, widths, sparsity, self)
        # The published codes take the share of each block that is cut; ours is of all blocks.
        share = sparsity if published else target / sum(int(width.weights.sum()) for width in widths)
        if self.heads:
            check_heads(widths, self.heads)
        counts = {}
        if alike:
            how = (self.heads, self.structure, self.compat, survey.refusal)
            counts = uniform_counts(widths, target, share, *how)
        counts = {name: self._rounded(widths, name, count) for name, count in counts.items()}
        if alike and self.sequential:
            return Plan(count=counts)
        found = self._survey(survey, {width.name for width in widths})
        scores = {name: grouped(values[0], self._named(widths, name), self.structure) for name, values in found.items()}
        heads = self.heads if self.structure == "AL-MM" else None
        keep = uniform(widths, scores, counts) if alike else adaptive(widths, scores, target, heads, self.compat)
        kept = {name: self._rounded(widths, name, int(mask.sum())) for name, mask in keep.items()}
        if self.sequential:
            return Plan(count=kept)
        if self.round_to > 1:
            keep = uniform(widths, scores, kept)
        return Plan(keep=keep, facts={name: values[1] for name, values in found.items()})

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Narrow]:
        """One edit for each width that loses a group."""
        edits = []
        matrices = {matrix.name: matrix for matrix in block.matrices()}
        for width in block.widths:
            if width.name in plan.keep:
                keep, means = plan.keep[width.name], plan.facts[width.name]
            elif width.name in plan.count:
                channels = self.score(width, matrices, stats).cpu()
                keep = highest(grouped(channels, width, self.structure), plan.count[width.name])
                means = self._means(width, stats)
            else:
                continue
            if not bool(keep.all()):
                edits.append(Narrow(width.name, keep, biases=self._bias(width, matrices, keep, means)))
        return edits

    def _rounded(self, widths: list[Width], name: str, count: int) -> int:
        return to_multiple(self._named(widths, name), count, self.round_to)

    def _named(self, widths: list[Width], name: str) -> Width:
        return next(width for width in widths if width.name == name)

    def _survey(self, survey: Blocks, names: set[str]) -> dict[str, Tensor]:
        """Width → `[2, channels]`: scores, and means of the inputs (zero without `bias`), on the dense model."""

        def visit(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
            matrices = {matrix.name: matrix for matrix in step.block.matrices()}
            parts = [
                torch.stack([self.score(width, matrices, stats).cpu(), self._means(width, stats)])
                for width in step.block.widths
            ]
            return torch.cat(parts, dim=1) if parts else torch.zeros(2, 0)

        found = survey.visit(visit, self.needs, text=bool(of_inputs(self.needs)))
        result = {}
        for block in survey.blocks:
            parts = found[block.name].split([len(width.consumer.groups) for width in block.widths], dim=1)
            result |= {width.name: part for width, part in zip(block.widths, parts, strict=True)}
        return {name: values for name, values in result.items() if name in names}

    def _means(self, width: Width, stats: Mapping[str, SiteStats]) -> Tensor:
        if not self.bias:
            return torch.zeros(len(width.consumer.groups))
        return stats[width.consumer.matrix][InputMoments].token_mean.cpu()

    def _bias(self, width: Width, matrices: Mapping, keep: Tensor, means: Tensor) -> dict[str, Tensor]:
        """Consumer → W[:, gone]·mean[gone], float32 `[out]`."""
        if not self.bias:
            return {}
        name = width.consumer.matrix
        weight = matrices[name].weight.float()
        gone = ~width.consumer.kept(keep).to(weight.device)
        return {name: weight[:, gone] @ means.to(weight.device)[gone]}
