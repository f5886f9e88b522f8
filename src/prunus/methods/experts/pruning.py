"""Experts go, with their rows of the router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunus.edits import Narrow
from prunus.errors import RecipeError
from prunus.methods.experts.choice import Case, Choice, Ranked, mask
from prunus.methods.experts.counts import Counts, apportioned, pools_of, target, uniform
from prunus.methods.experts.reception import receive
from prunus.methods.experts.redundancy import probe, warn
from prunus.methods.experts.replay import Replay
from prunus.methods.experts.seen import entering, watch
from prunus.methods.shape import Blocks, Plan
from prunus.sites import Block, Kind, SiteInfo
from prunus.statistics import BlockStates, SiteStats
from prunus.stream import Step


@dataclass(frozen=True)
class Experts:
    """How many experts each mixture keeps, and which. Where a router chooses among groups, equally many of each go.

    Attributes:
        choice: which stay.
        counts: how many go. `uniform`: the same share of every mixture, which stock classes load. `inverse`: in
            proportion to 1 / the mixture's importance (MoE-I²). `rank`: by its place in the order of importances. The
            importance is Σ over its experts of Σ ‖Z − Z without that expert‖_F.
        tokens: calibration tokens on which mixtures are run without some of their experts, at least 1.
        paper: where it was published.
    """

    choice: Choice = field(default_factory=Ranked)
    counts: Counts = "uniform"
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

    @property
    def bias(self) -> bool:
        """It makes none."""
        return False

    def even(self) -> Experts:
        """See `prunus.methods.shape.Uneven`."""
        return replace(self, counts="uniform")

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do."""

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """Masks of all mixtures, and what the redundancy probe says about them.

        Raises:
            RecipeError: so many experts cannot go, there are too many subsets to try, or several processes.
        """
        left = self._left(survey, sparsity)
        for pool in pools_of(survey):
            self.choice.check(pool, left[pool.name])
        candidates = self._candidates(survey, left)
        chosen = dict.fromkeys(candidates, 0)
        if self.choice.span > 1 and any(len(own) > 1 for own in candidates.values()):
            chosen = receive(survey, candidates, self.choice.span, self.tokens)
        keep = self._each(survey, {name: own[chosen[name]] for name, own in candidates.items()})
        return Plan(keep=keep, reports=self._probed(survey, chosen))

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Narrow]:
        """One edit for each mixture that loses an expert."""
        masks = [(pool.name, plan.keep[pool.name]) for pool in block.pools]
        return [Narrow(name, keep) for name, keep in masks if not bool(keep.all())]

    def _left(self, survey: Blocks, sparsity: float) -> dict[str, int]:
        """Mixture -> how many of its experts stay."""
        if self.counts == "uniform":
            return uniform(survey, sparsity)
        wanted = target(survey, sparsity)
        single = self._each(survey, survey.visit(self._without_one, self.needs))
        importance = {name: float(values.sum()) for name, values in single.items()}
        return apportioned(pools_of(survey), importance, wanted, self.counts)

    def _without_one(self, step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
        """Float64 `[experts of the block]`: how far each mixture is from the dense one without a single expert."""
        _alone(step)
        inputs = entering(step, self.tokens)
        replays = [(pool, Replay(step.block, pool, inputs[pool.name])) for pool in step.block.pools]
        values = [replay.distance(mask(pool, (one,))) for pool, replay in replays for one in range(pool.groups)]
        return torch.tensor(values, dtype=torch.float64)

    def _candidates(self, survey: Blocks, left: Mapping[str, int]) -> dict[str, Tensor]:
        """Block with mixtures -> bool `[candidates, its experts]`, the best first; each is also probed."""

        def visit(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
            if self.choice.compares:
                _alone(step)
            seen, inputs = watch(step), entering(step, self.tokens)
            rows, probes = [torch.ones(1, 0, dtype=torch.bool)], {}
            for pool in step.block.pools:
                if left[pool.name] == pool.groups:
                    rows.append(torch.ones(1, pool.groups, dtype=torch.bool))
                    continue
                replay = Replay(step.block, pool, inputs[pool.name])
                case = Case(pool, seen[pool.name], replay, left[pool.name])
                rows.append(self.choice(case))
                probes[pool.name] = [probe(case, keep) for keep in rows[-1]]
            survey.remember(f"experts-{step.block.name}", probes)
            return _side_by_side(rows[1:] or rows)

        found = survey.visit(visit, self.needs)
        return {block.name: found[block.name].bool() for block in survey.blocks if block.pools}

    def _probed(self, survey: Blocks, chosen: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Block -> what the probe found in its mixtures, for its report; warns where it is much."""
        found = {name: survey.recall(f"experts-{name}") for name in chosen}
        reports = {
            name: {pool: probes[min(chosen[name], len(probes) - 1)] for pool, probes in own.items()}
            for name, own in found.items()
        }
        size = sum(info.size for block in survey.blocks for info in block.infos)
        warn({pool: one for own in reports.values() for pool, one in own.items()}, pools_of(survey), size)
        return {name: {"experts": own} for name, own in reports.items()}

    def _each(self, survey: Blocks, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mixture -> its part of what was found for its block."""
        parts = {}
        for block in survey.blocks:
            if block.pools:
                own = found[block.name].split([pool.groups for pool in block.pools], dim=-1)
                parts |= {pool.name: one for pool, one in zip(block.pools, own, strict=True)}
        return parts


def _alone(step: Step) -> None:
    """See that one process works alone, which has all of the text that mixtures are compared on.

    Raises:
        RecipeError: there are several.
    """
    if step.processes.world > 1:
        raise RecipeError(
            "Mixtures are compared without some of their experts by one process alone; start one, or use --method reap "
            "with equal counts (method.counts=uniform)."
        )


def _side_by_side(rows: list[Tensor]) -> Tensor:
    """The candidates of several mixtures as those of their block: as many as each has, or a mixture's only one."""
    count = max(map(len, rows))
    return torch.cat([row[torch.arange(count).clamp(max=len(row) - 1)] for row in rows], dim=1)
