"""Which blocks go first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.gradients import LossGradientSum
from prunus.methods.depth.bypass import Bypassed
from prunus.methods.shape import Blocks
from prunus.sites import BlockSite
from prunus.statistics import BlockStates, SiteStats
from prunus.stream import Step
from prunus.trials import WholeModel


@dataclass(frozen=True)
class Top:
    """The last blocks go; the first k stay ("Why Lift so Heavy?", arXiv:2402.11700). For fine-tuning on one task.

    Attributes:
        spare: how many blocks at the very end stay nevertheless (1: the simple heuristic of arXiv:2403.17887).
    """

    spare: int = 0

    @property
    def needs(self) -> frozenset[type]:
        """Nothing."""
        return frozenset()

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """From the top downwards."""
        names = [site.name for site in sites]
        ends = names[len(names) - self.spare :]
        return [*reversed(names[: len(names) - self.spare]), *reversed(ends)]


@dataclass(frozen=True)
class BlockInfluence:
    """1 - mean over tokens of cos(x_i, x_i+1): a block that hardly turns its input goes (ShortGPT, §2.3)."""

    @property
    def needs(self) -> frozenset[type]:
        """Inputs and outputs of blocks."""
        return frozenset({BlockStates})

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """Lowest influence first; of equal ones the later block."""
        found = survey.visit(_turn, self.needs)
        influence = {name: 1 - float(value[0] / value[1]) for name, value in found.items()}
        place = {site.name: number for number, site in enumerate(sites)}
        return sorted(place, key=lambda name: (influence[name], -place[name]))


def _turn(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
    """Float64 `[2]`: Σ cos over tokens of all samples but the probe's, and their number."""
    total = torch.zeros(2, dtype=torch.float64)
    for before, after in list(zip(step.inputs, step.dense, strict=True))[:-1]:
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        total += torch.tensor([float(cosine.double().sum()), cosine.numel()], dtype=torch.float64)
    step.processes.add_up([total])
    return total


@dataclass(frozen=True)
class Angular:
    """The run of n blocks over which the last token turns least: arccos(cos(x_l, x_l+n))/π (Gromov et al., eq. 6)."""

    @property
    def needs(self) -> frozenset[type]:
        """Inputs and outputs of blocks."""
        return frozenset({BlockStates})

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """The run of `count` blocks with the smallest angle between what enters and what leaves it.

        Raises:
            RecipeError: the calibration text is shared by several processes, which each know only their own angles.
        """
        found = survey.visit(_last_tokens, self.needs)
        names = [site.name for site in sites]
        angles = [
            float(_angle(found[names[start]][0], found[names[start + count - 1]][1]).mean())
            for start in range(len(names) - count + 1)
        ]
        best = min(range(len(angles)), key=angles.__getitem__)
        return names[best : best + count]


def _last_tokens(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
    """Float32 `[2, samples, d]`: what the last token of every sample enters the block with, and leaves it with."""
    if step.processes.world > 1:
        raise RecipeError("The angular distance is measured by one process; start one.")
    pairs = list(zip(step.inputs, step.dense, strict=True))[:-1]
    before, after = (torch.cat([pair[side][:, -1].float() for pair in pairs]) for side in (0, 1))
    return torch.stack([before, after])


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """In [0, 1], a half turn is 1."""
    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / torch.pi


@dataclass(frozen=True)
class SingleLoss:
    """The loss with one block passed by; what raises it least goes (Shortened LLaMA's PPL, arXiv:2402.02834).

    Attributes:
        samples: how many of the calibration samples, from the end of the text, are judged; at least 1.
    """

    samples: int = 10

    @property
    def needs(self) -> frozenset[type]:
        """The whole model in memory."""
        return frozenset({WholeModel})

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """Lowest loss first; of equal ones the later block."""
        with Bypassed(survey, _at_least_one(self.samples)) as model:
            losses = [model.loss({site.name}) for site in sites]
        order = sorted(range(len(sites)), key=lambda place: (losses[place], -place))
        return [sites[place].name for place in order]


@dataclass(frozen=True)
class Greedy:
    """Block after block, each time the one whose loss, with all removed before, is lowest (SLEB, arXiv:2402.09025).

    The first and the last block that are left are never candidates.

    Attributes:
        samples: how many of the calibration samples, from the end of the text, are judged; at least 1.
    """

    samples: int = 16

    @property
    def needs(self) -> frozenset[type]:
        """The whole model in memory."""
        return frozenset({WholeModel})

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """In the order of removal.

        Raises:
            RecipeError: fewer than two blocks would be left.
        """
        if count > len(sites) - 2:
            raise RecipeError(
                f"{count} of {len(sites)} blocks would go; sleb keeps the first and the last, so ask for less."
            )
        gone: list[str] = survey.recall("greedy") or []
        with Bypassed(survey, _at_least_one(self.samples)) as model:
            while len(gone) < count:
                left = [site.name for site in sites if site.name not in gone][1:-1]
                losses = [model.loss({*gone, name}) for name in left]
                gone.append(left[min(range(len(left)), key=lambda place: (losses[place], -place))])
                gone = survey.remember("greedy", gone)
        return gone


@dataclass(frozen=True)
class Taylor:
    """Σ |W·∂L/∂W| over the matrices of a block, L the loss of all samples (Shortened LLaMA's Taylor)."""

    @property
    def needs(self) -> frozenset[type]:
        """The gradient of the mean loss."""
        return frozenset({LossGradientSum})

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """Lowest sum first; of equal ones the later block."""
        found = survey.visit(_taylor, self.needs, text=False)
        order = sorted(range(len(sites)), key=lambda place: (float(found[sites[place].name]), -place))
        return [sites[place].name for place in order]


def _taylor(step: Step, stats: Mapping[str, SiteStats]) -> Tensor:
    parts = [
        (matrix.weight.float() * stats[matrix.name][LossGradientSum].mean).abs().sum(dtype=torch.float64)
        for matrix in step.block.matrices()
    ]
    return torch.stack(parts).sum()


def _at_least_one(samples: int) -> int:
    if samples < 1:
        raise RecipeError(f"ranking.samples is {samples}; it must be at least 1.")
    return samples
